"""What does the model read for a conversation, and which characters of it did the assistant write?

    text  = template(messages)
    start = len(template(messages[:i], add_generation_prompt=True))      of assistant message i
    end   = len(template(messages[:i + 1]))                              without white space after the end-of-turn token

Both prefixes must be beginnings of `text`; a template that rewrites earlier turns (drops their thinking, say) is
refused, except for its last turn alone (`turns="last"`), which is exact. Where the template marks the assistant's
parts itself (`{% generation %}`), the marks decide.

Source: "Chat templates" in the documentation of transformers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from copra_llm.errors import InputError, nearest
from copra_llm.tasks.instruct.messages import text as readable
from copra_llm.tasks.instruct.records import Conversation

TURNS = ("all", "last")
"""Which assistant turns are trained."""

NAMED = {
    # Every turn between the ChatML marks; a model without these tokens reads them as ordinary text.
    "chatml": "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    # Role names as words; every turn but the first begins on a new line; the model's own end of text ends an answer.
    "plain": "{% for message in messages %}"
    "{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant', 'tool': 'Tool'}[message['role']] + ':' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ ' ' + message['content'] }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
    # Stanford Alpaca's headings; its first paragraph is the system message, where there is one.
    "alpaca": "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '### Response:\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n\n' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'tool' %}{{ raise_exception('this template has no tool messages') }}"
    "{% else %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}",
}
"""Templates to be asked for by name. All mark what the assistant wrote."""

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_READS = {
    "tools": re.compile(r"\btools\b"),
    "tool_calls": re.compile(r"\btool_calls\b"),
    "reasoning_content": re.compile(r"\b(reasoning_content|thinking)\b"),
}
"""What would vanish without a word in a template that never mentions it."""


@dataclass(frozen=True)
class Rendered:
    """What the model reads, as text."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """First and last + 1 character of each part that is trained, in order."""
    place: str


def template_text(tokenizer, chosen: str | None) -> str:
    """The Jinja source of a chat template.

    Args:
        tokenizer: of transformers.
        chosen: a name of `NAMED`, or a file; None: the tokenizer's own.

    Raises:
        InputError: if the tokenizer has none, or the name means nothing.
    """
    if chosen is None:
        try:
            return tokenizer.get_chat_template()
        except ValueError:
            raise InputError(
                f"the tokenizer has no chat template; give --chat_template {', '.join(NAMED)} or a file with one"
            ) from None
    if chosen in NAMED:
        # As the tokenizer would begin a text; inference adds nothing to what a template has written.
        return ("{{ bos_token }}" if begins_with_bos(tokenizer) else "") + NAMED[chosen]
    if not Path(chosen).is_file():
        raise InputError(
            f'--chat_template "{chosen}" is no file and none of {", ".join(NAMED)}{nearest(chosen, NAMED)}'
        )
    try:
        return Path(chosen).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{chosen} is not UTF-8 text (byte {error.start + 1}); give a Jinja template") from None


def begins_with_bos(tokenizer) -> bool:
    """Whether the tokenizer itself puts its beginning-of-text token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


class ChatTemplate:
    """A tokenizer's chat template, or another in its place."""

    def __init__(self, tokenizer, chosen: str | None = None, turns: str = "all"):
        """Compile the template.

        Args:
            tokenizer: of transformers.
            chosen: see `template_text`.
            turns: one of `TURNS`: "all", or "last" to train the last assistant turn of a conversation alone.

        Raises:
            InputError: for a template that is missing or no Jinja.
        """
        self.source, self.turns = template_text(tokenizer, chosen), turns
        self.marked = _MARKS.search(self.source) is not None
        """Whether the template marks what the assistant wrote."""
        self._tokens = tokenizer.special_tokens_map
        added = tokenizer.added_tokens_decoder.values()
        self._special = tuple({*tokenizer.all_special_tokens, *(t.content for t in added if t.special)})
        self._compile(chosen or "the tokenizer's chat template")

    def render(self, conversation: Conversation) -> Rendered:
        """The conversation as the model reads it.

        Raises:
            InputError: if the template refuses it, has no place for something in it, or cannot be split.
        """
        self._check_everything_is_written(conversation)
        text, marks = self._write(conversation, conversation.messages)
        turns = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        trained = [i for i in turns if i not in conversation.untrained]
        if self.turns == "last":
            trained = [i for i in trained if i == turns[-1]]
        if self.marked:
            spans = _of_turns(marks, turns, trained, conversation.place)
        else:
            spans = [self._span(conversation, i, text) for i in trained]
        spans = tuple((start, end) for start, end in spans if end > start)
        if not spans:
            raise InputError(f"{conversation.place}: the chat template leaves no text to train; remove the record")
        return Rendered(readable(text, f"{conversation.place}: the text"), spans, conversation.place)

    def _compile(self, name: str) -> None:
        from jinja2 import TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            render_jinja_template([[{"role": "user", "content": "a"}]], chat_template=self.source, **self._tokens)
        except TemplateSyntaxError as error:
            raise InputError(f"{name} is no Jinja template: {error.message}, line {error.lineno}; mend it") from None
        # Whatever else it says of this conversation, it will say of a record, with the record's place.
        except Exception:
            return

    def _check_everything_is_written(self, conversation: Conversation) -> None:
        for key, mentioned in _READS.items():
            given = conversation.tools if key == "tools" else any(m.get(key) for m in conversation.messages)
            if given and not mentioned.search(self.source):
                raise InputError(f"{conversation.place} has {key}, but the chat template never writes them; "
                                 "remove them, or give another --chat_template")  # fmt: skip

    def _span(self, conversation: Conversation, i: int, text: str) -> tuple[int, int]:
        """Of assistant message i, by the texts before and after it."""
        before, _ = self._write(conversation, conversation.messages[:i], add_generation_prompt=True)
        last = i + 1 == len(conversation.messages)
        through = text if last else self._write(conversation, conversation.messages[: i + 1])[0]
        if not (text.startswith(through) and through.startswith(before)):
            which = f"message {i + 1}" if text.startswith(before) else f"what stands before message {i + 1}"
            raise InputError(
                f"{conversation.place}: the chat template writes {which} otherwise within the whole conversation, so "
                'what is trained cannot be told; give --turns last, or a template with "{% generation %}" marks'
            )
        end = len(through.rstrip())
        # White space after an end-of-turn token is layout; where there is no such token, it is what ends the turn.
        return len(before), end if through[:end].endswith(self._special) else len(through)

    def _write(self, conversation: Conversation, messages, **options) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marks = render_jinja_template(
                [list(messages)],
                tools=list(conversation.tools) or None,
                chat_template=self.source,
                return_assistant_tokens_mask=self.marked,
                **options,
                **self._tokens,
            )
        # A template is a program of its own: it raises what it likes, and what Python raises beneath it.
        except Exception as error:
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(
                f'{conversation.place}: the chat template refuses this conversation ("{said}"); change it, or give '
                "another --chat_template"
            ) from None
        return texts[0], marks[0] if self.marked else []


def _of_turns(marks: list[tuple[int, int]], turns: list[int], trained: list[int], place: str) -> list[tuple[int, int]]:
    """The marked parts that belong to the trained turns."""
    if trained == turns:
        return marks
    if len(marks) != len(turns):
        raise InputError(
            f"{place}: the chat template marks {len(marks)} parts as the assistant's for {len(turns)} turns, so those "
            "not to be trained cannot be left out; give another --chat_template"
        )
    return [mark for mark, turn in zip(marks, turns, strict=True) if turn in trained]
