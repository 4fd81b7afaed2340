"""Label scores and losses of `copra_llm.classifiers` against a reference without cache, padding or batching."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from copra_llm.classifiers import build_classifier, make_head, mean_pool, read_heads
from copra_llm.errors import InputError
from copra_llm.label_tree import label_tree, takes_trees
from copra_llm.models import add_adapter, load_base
from copra_llm.settings import LoraSettings, ModelSettings
from copra_llm.tasks.mtl15 import Example, Task, get_task

# Float32 sums in another order: single scores of some 30 nats agree to 1e-5 here, ten times less than this.
CLOSE = {"rtol": 0, "atol": 1e-4}

REVIEWS = [
    Example({"title": "Bad", "text": "No."}, 0),
    Example({"title": "A lamp that lights up", "text": "I have read by it for a month, and it has not failed me."}, 4),
    Example({"title": "So", "text": "It came in a box with a note, a card and a pen. " * 3}, 2),
    Example({"title": "Kettle", "text": "Boils."}, 3),
]


def build(folder: Path, task: Task, max_length: int = 200, settings: dict | None = None, **options):
    """A classifier with an adapter that does something (B is not zero)."""
    base = load_base(ModelSettings(model_name_or_path=str(folder), **settings or {}))
    heads = {task.name: make_head(base, task, "label_words", 0)} if base.kind == "encoder" else {}
    model = add_adapter(base, LoraSettings(lora_r=4), init_seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    options = {"max_length": max_length, "heads": heads, "train_head": False} | options
    return build_classifier(base, model, [task], **options).eval()


def collate(classifier, task: Task, examples: list[Example]) -> dict:
    """The batch that training and evaluation would see."""
    return classifier.collate(task, [classifier.encode(task, e) for e in examples], [e.label for e in examples])


@torch.no_grad()
def reference_scores(classifier, task: Task, examples: list[Example], end: bool = False) -> Tensor:
    """log p(label | prompt) in nats `(examples, labels)`: one full forward pass for each example and label."""
    rows = []
    for example in examples:
        prompt = task.prompt(example.fields)
        tokens = classifier.tokenizer(prompt)["input_ids"]
        row = []
        for words in task.label_words:
            if classifier.seq2seq:
                answer = classifier.tokenizer(words)["input_ids"]
                start = classifier.model.config.decoder_start_token_id
                out = classifier.model(
                    input_ids=torch.tensor([tokens]), decoder_input_ids=torch.tensor([[start, *answer[:-1]]])
                )
                log_probs = out.logits[0].double().log_softmax(-1)
            else:
                whole = classifier.tokenizer(f"{prompt} {words}")["input_ids"]
                assert whole[: len(tokens)] == tokens
                answer = whole[len(tokens) :] + ([classifier.tokenizer.eos_token_id] if end else [])
                out = classifier.model(input_ids=torch.tensor([[*tokens, *answer]]), use_cache=False)
                log_probs = out.logits[0, len(tokens) - 1 : -1].double().log_softmax(-1)
            assert len(log_probs) == len(answer)
            row.append(sum(log_probs[i, token] for i, token in enumerate(answer)))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_t5"])
@pytest.mark.parametrize("name", ["amazon", "sst2", "dbpedia"])
def test_scores_are_the_label_words_likelihoods(model: str, name: str, request):
    """Scores of prompts of unequal length in one batch are log p(label words | prompt) of each by itself."""
    task = get_task(name)
    examples = [Example({"title": "x", **e.fields}, e.label % len(task.labels)) for e in REVIEWS]
    classifier = build(request.getfixturevalue(model), task)
    batch = collate(classifier, task, examples)
    assert len(set(batch["attention_mask"].sum(1).tolist())) == len(examples)
    with torch.no_grad():
        scores = classifier(batch, scores=True)
    assert scores.std() > 0.1
    torch.testing.assert_close(scores.double(), reference_scores(classifier, task, examples), **CLOSE)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_t5"])
def test_amazon_tests_what_it_should(model: str, request):
    """The labels above have unequal numbers of tokens, and two of several tokens share their first ones."""
    task = get_task("amazon")
    ids = dict(zip(task.labels, build(request.getfixturevalue(model), task).label_ids["amazon"], strict=True))
    assert len({len(i) for i in ids.values()}) > 1
    assert ids["very positive"][0] == ids["very negative"][0]
    assert len(ids["very positive"]) > 1


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_t5"])
def test_the_loss_is_minus_log_p_of_the_gold_label(model: str, request):
    """The training loss is the mean of -log p(gold label | prompt), and each example weighs the same."""
    task = get_task("amazon")
    classifier = build(request.getfixturevalue(model), task)
    expected = -reference_scores(classifier, task, REVIEWS)
    expected = torch.stack([expected[i, e.label] for i, e in enumerate(REVIEWS)]).mean()
    loss = classifier(collate(classifier, task, REVIEWS))
    torch.testing.assert_close(loss.detach().double(), expected, **CLOSE)


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_t5"])
def test_padding_changes_neither_score_nor_gradient(model: str, request):
    """The batch's loss and gradient are the means of those of its examples alone."""
    task = get_task("amazon")
    classifier = build(request.getfixturevalue(model), task)
    trained = [p for p in classifier.parameters() if p.requires_grad]
    together = torch.autograd.grad(classifier(collate(classifier, task, REVIEWS)), trained)
    alone = [torch.autograd.grad(classifier(collate(classifier, task, [e])), trained) for e in REVIEWS]
    for i, gradient in enumerate(together):
        torch.testing.assert_close(gradient, sum(g[i] for g in alone) / len(REVIEWS), rtol=1e-4, atol=1e-4)


def causal_of_every_kind(folder: Path, kind: str) -> Path:
    """A model whose attention is added up, or one that knows positions from its mask alone."""
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

    if kind == "bloom":
        tokenizer = AutoTokenizer.from_pretrained(folder)
        folder = folder.parent / "tiny_bloom"
        torch.manual_seed(0)
        config = BloomConfig(
            vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4, pad_token_id=tokenizer.pad_token_id
        )
        BloomForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("kind", "trees"), [("sdpa", True), ("eager", True), ("bloom", False)])
def test_every_kind_of_attention_gives_the_likelihoods(tiny_llama, kind: str, trees: bool):
    """In one pass where the model heeds the tree's mask, label by label where it does not."""
    task = get_task("dbpedia")
    examples = [Example({"title": "x", **e.fields}, e.label) for e in REVIEWS]
    attention = {} if kind == "bloom" else {"attn_implementation": kind}
    classifier = build(causal_of_every_kind(tiny_llama, kind), task, settings=attention)
    assert (classifier._mask_dtype is not None) == trees
    passes = []
    classifier.model.register_forward_pre_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        scores = classifier(collate(classifier, task, examples), scores=True)
    assert (len(passes) == 1) == trees
    torch.testing.assert_close(scores.double(), reference_scores(classifier, task, examples), **CLOSE)


@pytest.mark.parametrize("seed", range(8))
def test_trees_of_any_labels_give_the_likelihoods(tiny_llama, seed: int):
    """Random labels of one to five tokens of few kinds: deep trees, and labels that share all but the last token."""
    rng = np.random.default_rng(seed)
    task = get_task("amazon")
    classifier = build(tiny_llama, task)
    labels = {tuple(rng.integers(10, 13, rng.integers(1, 6)).tolist()) for _ in range(6)}
    label_ids = [list(ids) for ids in sorted(labels) if not any(o != ids and o[: len(ids)] == ids for o in labels)]
    tree = label_tree(label_ids)
    assert len(tree) == len({tuple(ids[:k]) for ids in label_ids for k in range(1, len(ids))})
    classifier.trees["amazon"] = tree
    batch = collate(classifier, task, REVIEWS)
    with torch.no_grad():
        together = classifier(batch, scores=True)
        apart = classifier._label_by_label(batch, label_ids)
    torch.testing.assert_close(together, apart, **CLOSE)


def test_a_model_that_ignores_the_trees_mask_is_not_given_one(tiny_llama, monkeypatch):
    """The trial sees it, and gives up as well where a model refuses such a mask."""
    model = load_base(ModelSettings(model_name_or_path=str(tiny_llama))).model
    assert takes_trees(model, 200)
    forward = type(model).forward

    def deaf(self, *args, attention_mask=None, **kwargs):
        return forward(self, *args, **kwargs)

    def refusing(self, *args, attention_mask=None, **kwargs):
        if attention_mask is not None:
            raise ValueError("a mask of two dimensions, please")
        return forward(self, *args, **kwargs)

    for own in (deaf, refusing):
        monkeypatch.setattr(type(model), "forward", functools.wraps(forward)(own))
        assert not takes_trees(model, 200)


def test_a_label_that_begins_another_is_compared_with_its_end(tiny_llama):
    """Where one label starts another ("good", "good indeed"), all are scored with their end of text."""
    task = dataclasses.replace(get_task("amazon"), labels=("a", "b", "c"), label_words=("good", "good indeed", "bad"))
    classifier = build(tiny_llama, task)
    assert all(ids[-1] == classifier.tokenizer.eos_token_id for ids in classifier.label_ids[task.name])
    examples = [dataclasses.replace(e, label=e.label % 3) for e in REVIEWS]
    with torch.no_grad():
        scores = classifier(collate(classifier, task, examples), scores=True)
    torch.testing.assert_close(scores.double(), reference_scores(classifier, task, examples, end=True), **CLOSE)


def test_labels_with_the_same_tokens_are_refused(tiny_llama):
    """Two labels that cannot be told apart."""
    task = dataclasses.replace(get_task("sst2"), label_words=("same", "same"))
    with pytest.raises(InputError, match="two labels of sst2 have the same tokens"):
        build(tiny_llama, task)


@pytest.mark.parametrize("max_length", [40, 64])
@pytest.mark.parametrize("name", ["boolq", "sst2"])
def test_truncation_keeps_the_template(tiny_llama, name: str, max_length: int):
    """A long input loses the end of its longest field, no more than it must; the rest of the prompt stays."""
    task = get_task(name)
    long = "the sea is wide and the road is long " * 30
    fields = {"text": long} if name == "sst2" else {"question": "is it so", "passage": long}
    classifier = build(tiny_llama, task, max_length=max_length)
    ids = classifier.encode(task, Example(fields, 0))
    text = classifier.tokenizer.decode(ids)
    begin, end = task.prompt({key: "|" if value is long else value for key, value in fields.items()}).split("|")
    assert text.startswith(begin) and text.endswith(end)
    assert long.startswith(text[len(begin) : -len(end)])
    assert max_length - 3 <= len(ids) <= max_length


def test_a_template_that_does_not_fit_is_refused(tiny_llama):
    """Where nothing is left to cut, the sentence names the setting and the task."""
    task = get_task("sst2")
    classifier = build(tiny_llama, task, max_length=5)
    with pytest.raises(InputError, match="--max_length 5 is too short for the template of sst2"):
        classifier.encode(task, Example({"text": "short"}, 0))


def test_a_prompt_that_fits_is_left_alone(tiny_llama):
    """No truncation at exactly max_length tokens."""
    task, example = get_task("sst2"), Example({"text": "short and sweet"}, 0)
    ids = build(tiny_llama, task).encode(task, example)
    assert build(tiny_llama, task, max_length=len(ids)).encode(task, example) == ids


# --- encoders ---------------------------------------------------------------------------------------------


def test_encoder_scores_are_the_head_on_the_mean_of_the_tokens(tiny_bert):
    """Scores of a padded batch are those of each example alone, and the loss is their cross-entropy."""
    task = get_task("mnli")
    examples = [
        Example({"premise": "It rains.", "hypothesis": "The street is wet, and the people stay at home."}, 1),
        Example({"premise": "A man sits on a bench in the park and reads.", "hypothesis": "He runs."}, 2),
        Example({"premise": "Yes.", "hypothesis": "No."}, 0),
    ]
    classifier = build(tiny_bert, task)
    rows = []
    with torch.no_grad():
        for example in examples:
            inputs = classifier.tokenizer(example.fields["premise"], example.fields["hypothesis"], return_tensors="pt")
            assert inputs["token_type_ids"].sum() > 0
            hidden = classifier.model(**inputs).last_hidden_state[0]
            rows.append(classifier.heads["mnli"] @ hidden.mean(0))
        batch = collate(classifier, task, examples)
        scores, loss = classifier(batch, scores=True), classifier(batch)
    torch.testing.assert_close(scores, torch.stack(rows), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(scores, torch.tensor([1, 2, 0])))


def test_encoder_truncation_keeps_both_texts(tiny_bert):
    """The longer text of a pair is cut to max_length tokens."""
    task = get_task("mnli")
    classifier = build(tiny_bert, task, max_length=40)
    encoded = classifier.encode(task, Example({"premise": "the sea is wide " * 50, "hypothesis": "It is wide."}, 0))
    assert len(encoded["input_ids"]) == 40
    assert classifier.tokenizer.decode(encoded["input_ids"]).endswith("It is wide.<sep>")


@pytest.mark.parametrize("kind", ["label_words", "random"])
def test_the_fixed_head_is_the_same_for_every_run(tiny_bert, kind: str):
    """Whatever the global generator's state, a head is the same, and making one moves no generator."""
    task = get_task("agnews")
    heads = []
    for seed in (0, 1):
        base = load_base(ModelSettings(model_name_or_path=str(tiny_bert)))
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        heads.append(make_head(base, task, kind, seed=0))
        assert torch.equal(torch.get_rng_state(), before)
    assert heads[0].shape == (4, 32)
    assert torch.equal(*heads)
    assert torch.equal(heads[0], make_head(base, task, "random", seed=1)) is False


def test_the_label_word_head_is_centred_and_scaled(tiny_bert):
    """Its rows point from the mean of the label words' embeddings to each, and have length sqrt(hidden)."""
    task = get_task("agnews")
    base = load_base(ModelSettings(model_name_or_path=str(tiny_bert)))
    head = make_head(base, task, "label_words", 0)
    with torch.no_grad():
        embedded = [mean_pool(base.model, dict(base.tokenizer(w, return_tensors="pt")))[0] for w in task.label_words]
    centred = torch.stack(embedded) - torch.stack(embedded).mean(0)
    torch.testing.assert_close(head, centred / centred.norm(dim=1, keepdim=True) * 32**0.5, rtol=1e-4, atol=1e-4)


def test_heads_are_read_as_saved(tiny_bert, tmp_path):
    """`read_heads` gives what `save_extras` wrote, and nothing where nothing was written."""
    classifier = build(tiny_bert, get_task("mnli"))
    classifier.save_extras(tmp_path)
    assert torch.equal(read_heads(tmp_path)["mnli"], classifier.heads["mnli"])
    assert read_heads(tmp_path / "elsewhere") == {}


def test_only_asked_for_heads_are_trained(tiny_bert):
    """The head is frozen unless `train_head`; the adapter is trained in any case."""
    for train_head in (False, True):
        classifier = build(tiny_bert, get_task("mnli"), train_head=train_head)
        trained = {name for name, p in classifier.named_parameters() if p.requires_grad}
        assert ("heads.mnli" in trained) == train_head
        assert all("lora_" in name for name in trained - {"heads.mnli"})


def test_wrong_head_settings_are_refused(tiny_bert, tiny_llama):
    """An unknown kind of head, and a trained head on a model that has none."""
    with pytest.raises(InputError, match='--head is "zeros"'):
        make_head(load_base(ModelSettings(model_name_or_path=str(tiny_bert))), get_task("sst2"), "zeros", 0)
    with pytest.raises(InputError, match="--train_head is for encoders; a causal model"):
        build(tiny_llama, get_task("sst2"), train_head=True)
