"""How good is a classifier on a split, and along the line between two adapters?

    accuracy = 100 * mean(argmax_y score(y | x) == gold)  [percent]
    loss     = mean(-log softmax(scores)[gold])           [nats]

Every example's outcome is kept, so that two models can be compared on the same examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from copra_llm.batches import EncodedSplit, eval_loader
from copra_llm.errors import InputError


@dataclass(frozen=True)
class Evaluation:
    """Outcomes in the order of the split's examples."""

    correct: np.ndarray
    """bool `(n,)`."""
    nll: np.ndarray
    """-log softmax(scores)[gold] in nats, float64 `(n,)`; of conversations each one's part in the loss."""
    predicted: np.ndarray
    """Label ids `(n,)`."""
    labels: np.ndarray
    """Gold label ids `(n,)`."""
    tokens: int | None = None
    """Trained tokens over which the loss is a mean; None: it is one over examples."""
    predicted_by_length: np.ndarray | None = None
    """Of choices: those with the best score a character `(n,)`; None where labels are all there is."""

    @property
    def accuracy(self) -> float:
        """Percent."""
        return 100.0 * float(self.correct.mean())

    @property
    def loss(self) -> float:
        """Mean in nats."""
        return float(self.nll.mean())

    def metrics(self, prefix: str, more: Metrics | None = None) -> dict[str, float]:
        """`{prefix}/accuracy`, `{prefix}/loss`, what else is known, and those of `more`, for a result record."""
        values = {"accuracy": self.accuracy, "loss": self.loss}
        if self.tokens is not None:
            values |= {"perplexity": float(np.exp(self.loss)), "tokens": self.tokens}
        if self.predicted_by_length is not None:
            values["acc_norm"] = 100.0 * float((self.predicted_by_length == self.labels).mean())
        for name, metric in (more or {}).items():
            # Macro averaging is the only kind that is defined for any number of labels.
            options = {"average": "macro"} if name in ("f1", "precision", "recall") else {}
            values |= metric.compute(predictions=self.predicted, references=self.labels, **options)
        return {f"{prefix}/{name}": float(value) for name, value in values.items()}


Metrics = dict[str, Any]
"""`evaluate` metrics by the name they were asked for."""


def load_metrics(names: list[str]) -> Metrics:
    """Metrics of the `evaluate` library, by name (from the Hub) or by the path of a metric script.

    Raises:
        InputError: if one cannot be loaded.
    """
    if not names:
        return {}
    import evaluate as evaluate_library

    metrics = {}
    for name in names:
        try:
            metrics[name] = evaluate_library.load(name, keep_in_memory=True)
        except Exception as error:
            raise InputError(
                f'the metric "{name}" could not be loaded ({type(error).__name__}); give a name that evaluate knows, '
                "with the Hub in reach, or the path of a metric script"
            ) from None
    return metrics


def evaluate(accelerator: Accelerator, classifier, split: EncodedSplit, batch_size: int) -> Evaluation:
    """Score every example of a split, with the whole adapter active.

    Args:
        accelerator: its processes share the batches.
        classifier: the classifier, prepared or not; its training mode is restored.
        split: the examples.
        batch_size: most examples a process takes in one forward pass. Where a device's memory does not suffice for
            them, one process by itself tries with half as many; several fail, for each would wait for the others.
    """
    while True:
        try:
            found = _outcomes(accelerator, classifier, split, batch_size)
            break
        except Exception as error:
            if batch_size == 1 or accelerator.num_processes > 1 or not should_reduce_batch_size(error):
                raise
        # Not inside the handler: the error's traceback holds the tensors of the pass that failed.
        batch_size //= 2
        clear_device_cache(garbage_collection=True)
    nll, predicted, by_length = found
    labels = np.array(split.labels)
    tokens = None if split.targets is None else int(split.targets.sum())
    return Evaluation(predicted == labels, nll * split.scale, predicted, labels, tokens, by_length)


def _outcomes(
    accelerator: Accelerator, classifier, split: EncodedSplit, batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Losses, answers and, of choices, answers by length of all examples `(n,)`."""
    own = accelerator.unwrap_model(classifier)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    loader = eval_loader(own, split, batch_size, device=device.type, rank=rank, world=world)
    found = []
    with scoring(accelerator, classifier):
        for batch in loader:
            batch = send_to_device(batch, device)
            index = batch.pop("index")
            scores = classifier(batch, scores=True)
            outcome = [index, *own.graded(scores, batch["labels"])]
            if "characters" in batch:
                outcome.append((scores / batch["characters"]).argmax(-1))
            found.append(outcome)
    # Once, at the end: processes have batches of unequal sizes. What comes twice is the same.
    columns = [torch.cat(parts).detach() for parts in zip(*found, strict=True)]
    if world > 1:
        columns = [torch.cat(gather_object([column.cpu()])) for column in columns]
    index, *values = (column.cpu().numpy() for column in columns)
    nll, predicted, *more = (_placed(index, value) for value in values)
    return nll, predicted, more[0] if more else None


def _placed(index: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` at the places that `index` gives."""
    placed = np.zeros(index.max() + 1, dtype=values.dtype)
    placed[index] = values
    return placed


def sharded(model) -> bool:
    """Whether a model's parameters are spread over processes, by FSDP or ZeRO-3."""
    return any(hasattr(p, "placements") or hasattr(p, "ds_id") for p in model.parameters())


@contextmanager
def scoring(accelerator: Accelerator, classifier) -> Iterator[None]:
    """Evaluation mode without gradients; the training mode comes back afterwards."""
    was_training = classifier.training
    classifier.eval()
    try:
        # What is gathered of a sharded model is kept for later passes, which may want gradients through it.
        with torch.no_grad(), torch.inference_mode(not sharded(classifier)), accelerator.autocast():
            yield
    finally:
        classifier.train(was_training)
