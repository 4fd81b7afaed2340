"""How does a language model answer a classification task, and what is its loss?

- Causal and seq2seq models answer with **label words**: a label's score is the log-likelihood of its whole
  text after the prompt, log p(label | prompt) = sum_k log p(token_k | prompt, tokens < k). Labels may share
  first tokens ("very positive", "very negative"). All labels of a prompt are scored in one pass (`label_tree`); of a
  model that does not allow it, each label of several tokens goes on from the prompt's keys and values.
- Encoders answer with a linear **head** on the mean of the last hidden states. It is fixed and the same for
  every run, so that the adapter does the work and adapters of different runs can be merged.

Each classifier is a module whose forward takes a collated batch and returns label scores or the loss, so
that whatever wraps it (DDP, FSDP, DeepSpeed) sees every forward pass.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from copra_llm.adapter_files import HEAD_FILE
from copra_llm.adapters import read_head_file
from copra_llm.errors import InputError
from copra_llm.label_tree import label_tree, mask_dtype, takes_trees
from copra_llm.models import Base, whole_base
from copra_llm.tasks.mtl15 import Example, Task


class Grading:
    """Loss and answer of an example from the scores of its labels."""

    def graded(self, scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Of `scores (batch, labels)`: -log softmax(scores)[gold] in nats, float64 `(batch,)`; answers `(batch,)`."""
        scores = scores.double()
        return F.cross_entropy(scores, labels, reduction="none"), scores.argmax(-1)


class LabelWordClassifier(Grading, nn.Module):
    """A causal or seq2seq model that answers with label words.

    Args:
        base: the loaded base model.
        model: the same model with its adapter.
        tasks: the tasks it is asked.
        max_length: longest prompt in tokens; longer ones lose the end of their longest text field.
    """

    def __init__(self, base: Base, model: nn.Module, tasks: list[Task], max_length: int):
        super().__init__()
        self.model = model
        self.tokenizer = base.tokenizer
        self.max_length = max_length
        self.seq2seq = base.kind == "seq2seq"
        self.label_ids = {task.name: self._label_ids(task) for task in tasks}
        self.trees = {} if self.seq2seq else {name: label_tree(ids) for name, ids in self.label_ids.items()}
        self._mask_dtype = None
        if any(map(len, self.trees.values())) and takes_trees(base.model, max_length):
            self._mask_dtype = mask_dtype(base.model)
        # The last positions of a batch are no contiguous block, and a linear layer over such a slice copies its
        # whole weight once for every example (measured: half of a bfloat16 step).
        base.model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0].contiguous(),))
        accepted = inspect.signature(base.model.forward).parameters
        self._takes_positions = "position_ids" in accepted

    # --- texts -> batches ---------------------------------------------------------------------------------

    def encode(self, task: Task, example: Example) -> list[int]:
        """Token ids of the prompt, at most `max_length`."""
        ids = self.tokenizer(task.prompt(example.fields))["input_ids"]
        fields = dict(example.fields)
        while len(ids) > self.max_length:
            longest = max(fields, key=lambda field: len(fields[field]))
            if not fields[longest]:
                raise InputError(f"--max_length {self.max_length} is too short for the template of {task.name}")
            # Cut by characters in proportion to the tokens too many, at least one, until it fits.
            share = (len(ids) - self.max_length) / len(ids)
            fields[longest] = fields[longest][: -max(1, int(share * len(fields[longest])))]
            ids = self.tokenizer(task.prompt(fields))["input_ids"]
        return ids

    def collate(self, task: Task, encoded: list[list[int]], labels: list[int]) -> dict:
        """Pad prompts on the left, so that what follows them starts at one position for the whole batch."""
        batch = _pad(encoded, self.tokenizer.pad_token_id, left=True)
        gold = _pad([self.label_ids[task.name][i] for i in labels], self.tokenizer.pad_token_id, left=False)
        answers = {f"answer_{key}": value for key, value in gold.items()}
        return {**batch, **answers, "labels": torch.tensor(labels), "task": task.name}

    def _label_ids(self, task: Task) -> list[list[int]]:
        """Token ids of each label's words as they follow a prompt."""
        if self.seq2seq:
            ids = [self.tokenizer(words)["input_ids"] for words in task.label_words]
        else:
            anchor = task.prompt_template.rsplit("\n", 1)[-1].format_map(_Anything())
            before = self.tokenizer(anchor, add_special_tokens=False)["input_ids"]
            ids = []
            for words in task.label_words:
                whole = self.tokenizer(f"{anchor} {words}", add_special_tokens=False)["input_ids"]
                if whole[: len(before)] != before or len(whole) == len(before):
                    raise InputError(f'the tokenizer joins the prompt of {task.name} with its label "{words}"')
                ids.append(whole[len(before) :])
        if len({tuple(i) for i in ids}) < len(ids):
            raise InputError(f"two labels of {task.name} have the same tokens; give them different label words")
        if any(a != b and b[: len(a)] == a for a in ids for b in ids):
            # "true" against "true story": whole answers are compared only if they end.
            ids = [[*i, self.tokenizer.eos_token_id] for i in ids]
        return ids

    # --- batches -> losses and scores ---------------------------------------------------------------------

    def forward(self, batch: dict, scores: bool = False) -> Tensor:
        """Label scores `(batch, num_labels)` in nats, or the mean of -log p(gold label | prompt)."""
        if not scores:
            return self._loss(batch)
        if self.seq2seq:
            return self._seq2seq_scores(batch, self.label_ids[batch["task"]])
        tree = self.trees[batch["task"]]
        if len(tree) and self._mask_dtype is None:
            return self._label_by_label(batch, self.label_ids[batch["task"]])
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if len(tree):
            inputs = tree.after(ids, mask, self._mask_dtype)
        else:
            inputs = {"input_ids": ids, "attention_mask": mask, **self._positions(mask)}
        return tree.scores(self.model(**inputs, logits_to_keep=1 + len(tree), use_cache=False).logits)

    def _loss(self, batch: dict) -> Tensor:
        answer, answer_mask = batch["answer_input_ids"], batch["answer_attention_mask"]
        targets = answer.masked_fill(answer_mask == 0, -100)  # (batch, answer)
        if self.seq2seq:
            inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
            logits = self.model(**inputs, labels=targets).logits
        else:
            ids = torch.cat([batch["input_ids"], answer], dim=1)
            mask = torch.cat([batch["attention_mask"], answer_mask], dim=1)
            keep = targets.shape[1] + 1  # logits where an answer's token is predicted, and one after the last
            out = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=keep, **self._positions(mask))
            logits = out.logits[:, :-1]  # (batch, answer, vocab)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") / len(targets)

    def _label_by_label(self, batch: dict, label_ids: list[list[int]]) -> Tensor:
        mask = batch["attention_mask"]
        first = self.model(
            input_ids=batch["input_ids"], attention_mask=mask, logits_to_keep=1, use_cache=True, **self._positions(mask)
        )
        log_probs = first.logits[:, -1].float().log_softmax(-1)  # (batch, vocab)
        scores = log_probs[:, [ids[0] for ids in label_ids]]
        cache, prompt_length = first.past_key_values, mask.shape[1]
        columns = []
        for i, ids in enumerate(label_ids):
            if len(ids) == 1:
                columns.append(scores[:, i])
                continue
            given = torch.tensor(ids[:-1], device=mask.device).expand(len(mask), -1)
            longer = torch.cat([mask, mask.new_ones(given.shape)], dim=1)
            positions = self._positions(longer)
            positions = {key: value[:, prompt_length:] for key, value in positions.items()}
            out = self.model(input_ids=given, attention_mask=longer, past_key_values=cache, use_cache=True, **positions)
            rest = out.logits.float().log_softmax(-1)  # (batch, len - 1, vocab)
            wanted = torch.tensor(ids[1:], device=mask.device).expand(len(mask), -1)
            columns.append(scores[:, i] + rest.gather(-1, wanted.unsqueeze(-1)).sum((1, 2)))
            cache.crop(-len(ids) + 1)
        return torch.stack(columns, dim=1)

    def _seq2seq_scores(self, batch: dict, label_ids: list[list[int]]) -> Tensor:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        encoded = self.model.get_base_model().get_encoder()(**inputs)
        columns = []
        for ids in label_ids:
            # Repeated, not expanded: T5 takes a view of its labels.
            targets = torch.tensor([ids] * len(inputs["input_ids"]), device=batch["input_ids"].device)
            out = self.model(encoder_outputs=encoded, attention_mask=inputs["attention_mask"], labels=targets)
            log_probs = out.logits.float().log_softmax(-1)
            columns.append(log_probs.gather(-1, targets.unsqueeze(-1)).sum((1, 2)))
        return torch.stack(columns, dim=1)

    def _positions(self, mask: Tensor) -> dict[str, Tensor]:
        if not self._takes_positions:
            return {}
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}

    def save_extras(self, folder: Path) -> None:
        """Nothing beyond the adapter: the label words are the vocabulary's."""


class EncoderClassifier(Grading, nn.Module):
    """An encoder with one linear head a task on its mean-pooled last hidden states.

    Args:
        base: the loaded encoder.
        model: the same model with its adapter.
        tasks: the tasks it is asked.
        max_length: longest input in tokens.
        heads: `{task: (num_labels, hidden)}` from `make_head` or `read_heads`.
        train_head: whether the heads are trained with the adapter.
    """

    def __init__(
        self,
        base: Base,
        model: nn.Module,
        tasks: list[Task],
        max_length: int,
        heads: dict[str, Tensor],
        train_head: bool = False,
    ):
        super().__init__()
        self.model = model
        self.tokenizer = base.tokenizer
        self.max_length = max_length
        self.labels = {task.name: list(task.labels) for task in tasks}
        self.heads = nn.ParameterDict({name: nn.Parameter(heads[name].clone(), train_head) for name in self.labels})

    def encode(self, task: Task, example: Example) -> dict[str, list[int]]:
        """Token ids and types of the text or pair, at most `max_length`."""
        encoded = self.tokenizer(*task.inputs(example.fields), truncation="longest_first", max_length=self.max_length)
        return dict(encoded)

    def collate(self, task: Task, encoded: list[dict[str, list[int]]], labels: list[int]) -> dict:
        batch = self.tokenizer.pad(encoded, return_tensors="pt")
        return {**batch, "labels": torch.tensor(labels), "task": task.name}

    def forward(self, batch: dict, scores: bool = False) -> Tensor:
        """Label scores `(batch, num_labels)`, or the mean cross-entropy in nats."""
        inputs = {key: value for key, value in batch.items() if key not in ("labels", "task")}
        pooled = mean_pool(self.model, inputs).to(self.heads[batch["task"]].dtype)
        logits = pooled @ self.heads[batch["task"]].T  # (batch, hidden) @ (hidden, labels)
        return logits if scores else F.cross_entropy(logits.float(), batch["labels"])

    def save_extras(self, folder: Path) -> None:
        """Write the heads beside the adapter."""
        from safetensors.torch import save_file

        tensors = {f"{task}.weight": head.detach().cpu().contiguous() for task, head in self.heads.items()}
        save_file(tensors, folder / HEAD_FILE, metadata={"labels": json.dumps(self.labels)})


Classifier = LabelWordClassifier | EncoderClassifier


def build_classifier(
    base: Base, model: nn.Module, tasks: list[Task], *, max_length: int, heads: dict[str, Tensor], train_head: bool
) -> Classifier:
    """The classifier that fits the kind of model; `heads` and `train_head` concern encoders alone."""
    if base.kind != "encoder":
        if train_head:
            raise InputError(f"--train_head is for encoders; a {base.kind} model answers with label words")
        return LabelWordClassifier(base, model, tasks, max_length)
    return EncoderClassifier(base, model, tasks, max_length, heads, train_head)


def mean_pool(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Mean of the last hidden states over the tokens: `(batch, hidden)`."""
    hidden = model(**inputs).last_hidden_state  # (batch, tokens, hidden)
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def make_head(base: Base, task: Task, kind: str, seed: int) -> Tensor:
    """A fixed head `(num_labels, hidden)`, the same for every run on this encoder and task.

    Args:
        base: the encoder without an adapter.
        task: gives the label words.
        kind: "label_words" takes the encoder's own embeddings of the label words, centred over the labels
            and scaled to length sqrt(hidden); "random" draws every entry from N(0, 1).
        seed: of the random head.
    """
    hidden = base.model.config.hidden_size
    if kind == "random":
        # torch's CPU generator is the same on every machine; a generator of its own moves no global one.
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(len(task.labels), hidden, generator=generator)
    if kind != "label_words":
        raise InputError(f'--head is "{kind}", but must be label_words or random')
    inputs = base.tokenizer(list(task.label_words), padding=True, return_tensors="pt")
    with torch.no_grad(), whole_base(base.model):
        embedded = mean_pool(base.model.eval(), dict(inputs)).float()  # (labels, hidden)
    centred = embedded - embedded.mean(0)
    return F.normalize(centred, dim=-1) * hidden**0.5


def read_heads(folder: Path) -> dict[str, Tensor]:
    """The heads saved beside an adapter, `{}` if there are none.

    Raises:
        InputError: as `adapters.read_head_file`.
    """
    heads, _ = read_head_file(Path(folder))
    return {key.removesuffix(".weight"): head for key, head in heads.items()}


def _pad(rows: list[list[int]], pad_id: int, *, left: bool) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, span] = torch.tensor(row)
        mask[i, span] = 1
    return {"input_ids": ids, "attention_mask": mask}


class _Anything(dict):
    """For `str.format_map`: every field is the letter x."""

    def __missing__(self, key: str) -> str:
        return "x"
