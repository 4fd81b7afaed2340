"""How good is a classifier on a split, and along the line between two adapters?

    accuracy = 100 * mean(argmax_y score(y | x) == gold)  [percent]
    loss     = mean(-log softmax(scores)[gold])           [nats]

Every example's outcome is kept, so that two models can be compared on the same examples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from copra_llm.batches import EncodedSplit, eval_loader


@dataclass(frozen=True)
class Evaluation:
    """Outcomes in the order of the split's examples."""

    correct: np.ndarray
    """bool `(n,)`."""
    nll: np.ndarray
    """-log softmax(scores)[gold] in nats, float64 `(n,)`."""

    @property
    def accuracy(self) -> float:
        """Percent."""
        return 100.0 * float(self.correct.mean())

    @property
    def loss(self) -> float:
        """Mean in nats."""
        return float(self.nll.mean())

    def metrics(self, prefix: str) -> dict[str, float]:
        """`{prefix}/accuracy` and `{prefix}/loss`, for a result record."""
        return {f"{prefix}/accuracy": self.accuracy, f"{prefix}/loss": self.loss}


def evaluate(accelerator: Accelerator, classifier, split: EncodedSplit, batch_size: int) -> Evaluation:
    """Score every example of a split, with the whole adapter active.

    Args:
        accelerator: gathers over its processes.
        classifier: the classifier, prepared or not; its training mode is restored.
        split: the examples.
        batch_size: examples a process takes in one forward pass.
    """
    loader = accelerator.prepare_data_loader(eval_loader(accelerator.unwrap_model(classifier), split, batch_size))
    correct = np.zeros(len(split), dtype=bool)
    nll = np.zeros(len(split))
    was_training = classifier.training
    classifier.eval()
    try:
        with torch.inference_mode(), accelerator.autocast():
            for batch in loader:
                index = batch.pop("index")
                scores = classifier(batch, scores=True).double()  # (batch, num_labels)
                losses = torch.nn.functional.cross_entropy(scores, batch["labels"], reduction="none")
                hits = scores.argmax(-1) == batch["labels"]
                index, losses, hits = accelerator.gather_for_metrics((index, losses, hits))
                index = index.cpu().numpy()
                correct[index], nll[index] = hits.cpu().numpy(), losses.cpu().numpy()
    finally:
        classifier.train(was_training)
    return Evaluation(correct, nll)
