"""Are exactly the assistant's tokens trained, whatever the chat template?"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from examples import REAL_DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from instruct_templates import (
    CHATML,
    FORGETFUL,
    LAST_END,
    LLAMA3,
    MISTRAL,
    NO_END,
    SHAPES,
    bos_tokenizer,
    sentencepiece_tokenizer,
    smollm2_tokenizer,
)
from tokenizers import processors

from copra_llm.errors import InputError
from copra_llm.models import load_tokenizer
from copra_llm.tasks.instruct.encode import Encoded, Encoder
from copra_llm.tasks.instruct.messages import conversation
from copra_llm.tasks.instruct.named import NAMED
from copra_llm.tasks.instruct.records import Broken, Text
from copra_llm.tasks.instruct.sources import Reader, Source, strict

INSTRUCT = REAL_DATA / "instruct"
TALK = [("user", "Hi"), ("assistant", "Hello."), ("user", "And?"), ("assistant", "Bye.")]


@pytest.fixture(scope="module")
def tokenizer():
    return smollm2_tokenizer()


@pytest.fixture(scope="module")
def encoder(tokenizer, tmp_path_factory):
    """An encoder for a template's source; an empty one is the tokenizer's own."""
    folder = tmp_path_factory.mktemp("templates")

    @functools.cache
    def make(source: str, tokenizer=tokenizer, turns="all") -> Encoder:
        path = folder / f"{len(list(folder.iterdir()))}.jinja"
        path.write_text(source, encoding="utf-8")
        return Encoder(tokenizer, str(path) if source else None, turns)

    return make


def talk(turns=TALK, **settings):
    return conversation([{"role": role, "content": said} for role, said in turns], "f, line 1", **settings)


def trained_runs(example: Encoded, tokenizer) -> list[str]:
    """Decoded runs of neighbouring trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], example.trained, [False]])))
    return [tokenizer.decode(example.input_ids[a:b]) for a, b in edges.reshape(-1, 2)]


def whole(example: Encoded, tokenizer) -> str:
    return tokenizer.decode(example.input_ids)


# --- chat templates ---------------------------------------------------------------------------------------

# Text as people write it, and as nobody does: other scripts, emoji, line breaks inside. The first character is no
# white space: that would be one token with the header's line break (its own test is below). Beyond U+3FFFF the model's
# vocabulary lacks bytes, and drops them.
LETTERS = st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"])
WORDS = st.text(alphabet=st.one_of(st.sampled_from("aé中🙂 \n\t.,<|>{}"), LETTERS))
SAID = WORDS.map(lambda text: "A" + text)


@st.composite
def conversations(draw, system: bool):
    turns = [("system", draw(SAID))] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        turns += [("user", draw(SAID)), ("assistant", draw(SAID))]
    return talk(turns)


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_trained_tokens_are_what_the_assistant_said(name, data, encoder, tokenizer):
    """Decoded, they are each assistant content with its end of turn; all tokens are those of the whole text."""
    shape = SHAPES[name]
    chat = data.draw(conversations(shape.system))
    example = encoder(shape.source).encode(chat)
    said = [message["content"] for message in chat.messages if message["role"] == "assistant"]
    assert trained_runs(example, tokenizer) == [shape.trained(text) for text in said]
    messages = list(chat.messages)
    if shape.parts:
        messages = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    text = tokenizer.apply_chat_template(messages, chat_template=shape.source or None, tokenize=False)
    assert example.input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_marks_are_read_as_transformers_reads_them(data, encoder, tokenizer):
    """The assistant mask of its own `apply_chat_template`."""
    chat = data.draw(conversations(True))
    theirs = tokenizer.apply_chat_template(
        list(chat.messages), chat_template=CHATML, return_dict=True, return_assistant_tokens_mask=True
    )
    example = encoder(CHATML).encode(chat)
    assert example.input_ids.tolist() == theirs["input_ids"]
    assert example.trained.tolist() == [bool(mark) for mark in theirs["assistant_masks"]]


def test_smollm2_puts_its_own_system_message(encoder, tokenizer):
    """Where there is none; it is not trained."""
    example = encoder("").encode(talk(TALK[:2]))
    assert whole(example, tokenizer) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
    )
    assert trained_runs(example, tokenizer) == ["Hello.<|im_end|>"]


def test_a_token_that_spans_the_boundary_is_trained(encoder, tokenizer):
    """The header's line break and the answer's are one token; leaving it out would leave out part of the answer."""
    example = encoder("").encode(talk([("user", "Hi"), ("assistant", "\n\nHello.")]))
    assert trained_runs(example, tokenizer) == ["\n\n\nHello.<|im_end|>"]


def test_a_token_that_spans_the_end_is_trained(encoder, tokenizer):
    """For the same reason."""
    marked = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{{ '\n' }}{% endfor %}"
    example = encoder(marked).encode(talk([("user", "Hi"), ("assistant", "Hello\n")]))
    assert trained_runs(example, tokenizer)[-1] == "Hello\n\n"


def test_a_turn_without_an_end_token_ends_with_its_white_space(encoder, tokenizer):
    """It is all that a model can learn to stop at."""
    example = encoder(NO_END).encode(talk(TALK))
    assert trained_runs(example, tokenizer) == [" Hello.\n\n", " Bye.\n\n"]


def test_a_token_that_ends_the_text_alone(encoder, tokenizer):
    """Earlier turns end without it, and are exact all the same."""
    example = encoder(LAST_END).encode(talk(TALK))
    assert trained_runs(example, tokenizer) == ["Hello.<end_of_turn>", "Bye.<end_of_turn>\n<|im_end|>"]


@pytest.mark.parametrize("name", NAMED)
def test_templates_by_name(name, tokenizer):
    """End of turn is ChatML's, or the tokenizer's own end of text."""
    end = "<|im_end|>" if name == "chatml" else tokenizer.eos_token
    space = " " if name == "plain" else ""
    example = Encoder(tokenizer, name).encode(talk([("system", "Be."), *TALK]))
    assert trained_runs(example, tokenizer) == [space + "Hello." + end, space + "Bye." + end]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], chat_template=NAMED[name], tokenize=False, add_generation_prompt=True
    )
    short = whole(Encoder(tokenizer, name).encode(talk(TALK[:2])), tokenizer)
    assert short.startswith(prompt + space + "Hello.")


@pytest.mark.parametrize("source", [CHATML, MISTRAL], ids=["marked", "split"])
def test_which_turns_are_trained(source, encoder, tokenizer):
    """All, the last alone, or none of a prompt's; marks go by turn then."""
    prompt = talk(TALK, prompt=3)
    assert len(trained_runs(encoder(source).encode(talk(TALK)), tokenizer)) == 2
    for chat, turns in ((prompt, "all"), (talk(TALK), "last")):
        (run,) = trained_runs(encoder(source, turns=turns).encode(chat), tokenizer)
        assert run.strip() == "Bye.<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused_but_for_the_last(encoder, tokenizer):
    """Its last turn is exact: what stands before it is what the model will read then."""
    thinking = [("user", "Hi"), ("assistant", "<think>a</think>Hello."), ("user", "And?"),
                ("assistant", "<think>b</think>Bye.")]  # fmt: skip
    with pytest.raises(InputError) as refused:
        encoder(FORGETFUL).encode(talk(thinking))
    assert str(refused.value) == (
        "f, line 1: the chat template writes message 2 otherwise within the whole conversation, so what is trained "
        'cannot be told; give --turns last, or give a template with "{% generation %}" marks'
    )
    example = encoder(FORGETFUL, turns="last").encode(talk(thinking))
    assert trained_runs(example, tokenizer) == ["<think>b</think>Bye.<|im_end|>"]
    assert "a</think>" not in whole(example, tokenizer)
    # Nothing to forget: exact too.
    assert len(trained_runs(encoder(FORGETFUL).encode(talk(TALK)), tokenizer)) == 2


def test_a_template_that_ends_its_last_turn_otherwise_is_refused_but_for_it(encoder, tokenizer):
    """Not cut at the special token that the two texts last agree on, which stands before what was said."""
    source = (
        "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>' + m['content'] }}"
        "{{ '<end_of_turn>' if loop.last and m['role'] == 'assistant' else '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant' }}{% endif %}"
    )
    with pytest.raises(InputError, match="writes message 2 otherwise"):
        encoder(source).encode(talk(TALK))
    assert trained_runs(encoder(source, turns="last").encode(talk(TALK)), tokenizer) == [
        "<|end_header_id|>Bye.<end_of_turn>"
    ]


def test_a_template_that_reorders_is_refused(encoder):
    """Latest message first: no prefix of the conversation is a prefix of its text."""
    backwards = "{% for m in messages | reverse %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(InputError, match="writes what stands before message 2 otherwise"):
        encoder(backwards).encode(talk(TALK))


@pytest.mark.parametrize(
    "source, chat, said",
    [
        (MISTRAL, talk([("system", "Be."), *TALK]),
         'f, line 1: the chat template refuses this conversation ("Only user and assistant roles are supported!"); '
         "change it, or give another --chat_template"),
        (LLAMA3, talk(TALK, tools=[{}]), "f, line 1 has tools, but the chat template never writes them"),
        ("{% for m in messages %}{{ m['content'] if m['role'] != 'system' }}{% endfor %}",
         talk([("system", "Be."), *TALK]), "leaves out or rewrites message 1, the system's; remove it, or"),
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", talk(), "leaves out or rewrites message 1"),
        ("{% for m in messages %}{{ m['content'] + ('<think>' if add_generation_prompt else '') }}{% endfor %}",
         talk(TALK[:2]), "writes what stands before message 2 otherwise within the whole conversation, so what is "
         'trained cannot be told; give a template with "{% generation %}" marks'),
        ("{{ messages[0]['content'] + 1 }}", talk(), 'refuses this conversation ("can only concatenate str'),
        ("{% for m in messages %}{{ m['content'] }}{% generation %}{% endgeneration %}{% endfor %}", talk(),
         "leaves no text to train; remove the record"),
        ("{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}",
         talk(TALK, prompt=2), "marks 4 parts as the assistant's for 2 turns"),
    ],
)  # fmt: skip
def test_what_a_template_does_not_take(source, chat, said, encoder):
    """One sentence with the place; in a stream it is a broken record among the others."""
    with pytest.raises(InputError) as refused:
        encoder(source).encode(chat)
    assert said in str(refused.value)
    text = Text("", "Once", "f, line 2")
    broken, good = encoder(source).stream([chat, text])
    assert broken == Broken("f, line 1", str(refused.value)) and good.place == "f, line 2"


def test_calls_and_thinking_do_not_vanish(encoder, tokenizer):
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    chat = conversation([{"role": "user", "content": "Hi"}, asked], "f, line 1", tools=[{"name": "add"}])
    example = encoder(SHAPES["tools"].source).encode(chat)
    assert trained_runs(example, tokenizer) == ['<call>{"name": "add", "arguments": {"a": 1}}<|im_end|>']
    assert '[{"name": "add"}]' in whole(example, tokenizer)
    with pytest.raises(InputError, match="has tool_calls, but the chat template never writes them"):
        encoder("").encode(conversation(list(chat.messages), "f, line 1"))
    thought = {"role": "assistant", "content": "Hello.", "reasoning": "Greet."}
    with pytest.raises(InputError, match="has reasoning_content, but the chat template never writes them"):
        encoder("").encode(conversation([chat.messages[0], thought], "f, line 1"))


@pytest.mark.parametrize(
    "chosen, said",
    [
        ("chatlm", '"chatlm" is no file and none of chatml, plain, alpaca (did you mean "chatml"?)'),
        ("torn.jinja", "is no Jinja template: "),
        ("latin.jinja", "is not UTF-8 text (byte 1)"),
    ],
)
def test_a_template_that_is_none(chosen, said, tokenizer, tmp_path):
    """Before anything is read."""
    (tmp_path / "torn.jinja").write_text("{% for m in messages %}", encoding="utf-8")
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    with pytest.raises(InputError) as refused:
        Encoder(tokenizer, str(tmp_path / chosen) if chosen.endswith("jinja") else chosen)
    assert said in str(refused.value)


def test_a_model_without_a_template_needs_one_by_name_for_conversations_alone(tiny_llama):
    """A fault of the model, not of each record."""
    bare = Encoder(load_tokenizer(str(tiny_llama)))
    with pytest.raises(InputError, match="no chat template; give --chat_template chatml, plain, alpaca or a file"):
        list(bare.stream([talk()]))
    assert len(list(bare.stream([Text("", "Once", "f, line 1")]))) == 1
    assert Encoder(bare.tokenizer, "plain").encode(talk()).trained.any()


# --- text -------------------------------------------------------------------------------------------------


def test_text_is_trained_to_its_end(tokenizer):
    """A completion without its prompt, plain text whole, each with the end of text."""
    encoder, end = Encoder(tokenizer), tokenizer.eos_token
    example = encoder.encode(Text("1 + 2 =", " 3", "f, line 1"))
    assert trained_runs(example, tokenizer) == [" 3" + end]
    assert whole(example, tokenizer) == "1 + 2 = 3" + end
    plain = encoder.encode(Text("", "Once upon", "f, line 1"))
    assert plain.trained.all() and whole(plain, tokenizer) == "Once upon" + end
    ended = encoder.encode(Text("", "Once upon" + end, "f, line 1"))
    assert np.array_equal(ended.input_ids, plain.input_ids)


def test_one_token_begins_a_text():
    """The tokenizer's, before text; a template's own; never both, and none is trained."""
    tokenizer = bos_tokenizer()
    bos = tokenizer.bos_token_id
    for record, chosen in (
        (Text("", "Once", "f"), None),
        (Text("", "<|bos|>Once", "f"), None),
        (Text("1 +", " 2", "f"), None),
        (talk(), "chatml"),
        (talk(), "plain"),
    ):
        example = Encoder(tokenizer, chosen).encode(record)
        assert example.input_ids[0] == bos and bos not in example.input_ids[1:], (record, chosen)
    assert not Encoder(tokenizer).encode(Text("1 +", " 2", "f")).trained[0]


def test_a_template_that_writes_the_beginning_itself(encoder):
    tokenizer = bos_tokenizer()
    ids = encoder(LLAMA3, tokenizer).encode(talk()).input_ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_words_that_begin_with_a_mark_and_characters_in_bytes():
    """SentencePiece's way: the trained tokens hold exactly the characters of the span, bytes of one character all."""
    tokenizer = sentencepiece_tokenizer()
    record = Text("the user asks", " what 🙂\n", "f")
    example = Encoder(tokenizer).encode(record)
    assert tokenizer.decode(example.input_ids[~example.trained]) == "the user asks"
    pieces = tokenizer.convert_ids_to_tokens(example.input_ids[example.trained])
    assert pieces[0].startswith("▁") and pieces[-1] == "</s>"
    assert pieces[-6:-1] == ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "<0x0A>"]


def test_white_space_belongs_to_the_answer_where_offsets_are_trimmed():
    """GPT-2's and Llama 3's post-processor takes spaces off the offsets: those at the end would belong to nothing."""
    tokenizer = smollm2_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    example = Encoder(tokenizer).encode(Text("Say:", "  yes   ", "f"))
    assert trained_runs(example, tokenizer) == ["  yes   " + tokenizer.eos_token]


def test_a_tokenizer_that_was_set_to_cut_cuts_nothing(tokenizer):
    """Cutting is counted, elsewhere."""
    tokenizer("a", truncation=True, max_length=2)
    assert len(Encoder(tokenizer).encode(Text("", "word " * 50, "f"))) > 50


def test_what_no_tokenizer_takes(tokenizer, tiny_bert):
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match="is a slow one"):
        Encoder(Slow())
    with pytest.raises(InputError, match='--turns is "first", but must be all or last'):
        Encoder(tokenizer, turns="first")
    endless = load_tokenizer(str(tiny_bert))
    endless.eos_token = None
    with pytest.raises(InputError, match="no end-of-text token"):
        Encoder(endless)


def test_a_batch_is_its_records_one_by_one(encoder, tokenizer):
    """Whatever the batches' ends fall on, and the tokenizer is left as it was."""
    records = [talk([("user", "Hi " * (i % 7)), ("assistant", f"{i}.")]) for i in range(3, 1100) if i % 7]
    before = tokenizer.backend_tokenizer.to_str()
    batched = list(encoder("").stream(records))
    assert tokenizer.backend_tokenizer.to_str() == before
    for i in (0, 511, 512, len(records) - 1):
        alone = encoder("").encode(records[i])
        assert np.array_equal(alone.input_ids, batched[i].input_ids)
        assert np.array_equal(alone.trained, batched[i].trained)


# --- real data --------------------------------------------------------------------------------------------


@pytest.mark.skipif(not INSTRUCT.is_dir(), reason=f"{INSTRUCT} is not there; COPRA_TEST_DATA names its parent")
@pytest.mark.parametrize("name", ["alpaca", "gsm8k", "commonsense/boolq", "superni/task591_sciq_answer_generation"])
def test_real_answers_are_what_is_trained(name, encoder, tokenizer):
    """Of every record: its answer and the end of turn, apart from white space that is one token with the header's."""
    records = list(strict(Reader(Source(str(INSTRUCT / name / "test.jsonl")))))
    assert len(records) >= 100
    for record, example in zip(records, strict(encoder("").stream(records)), strict=True):
        (run,) = trained_runs(example, tokenizer)
        assert run.lstrip() == (record.messages[-1]["content"] + "<|im_end|>").lstrip()
