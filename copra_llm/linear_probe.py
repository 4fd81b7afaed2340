"""How well does a linear classifier do on the features of a frozen model?

    minimise over W, b:   mean of -log softmax(W x + b)[y]  +  l2 / 2 ||W||^2

Multinomial logistic regression on features of length 1, convex, solved by L-BFGS; the strength `l2` that does best on
dev is taken.

Source: CLIP (arXiv 2103.00020), section 3.2 and appendix A.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STRENGTHS = tuple(10.0**k for k in range(-7, 0))
"""Of `l2`, from hardly any to much."""
MAX_ITERATIONS = 1000
"""The paper's."""


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier."""

    weight: Tensor
    """`(classes, dim)`."""
    bias: Tensor
    """`(classes,)`."""
    l2: float

    def scores(self, features: Tensor) -> Tensor:
        """Of `features (n, dim)`: float64 `(n, classes)`."""
        return features.double() @ self.weight.T + self.bias

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Percent."""
        return 100.0 * float((self.scores(features).argmax(-1) == labels).double().mean())

    def loss(self, features: Tensor, labels: Tensor) -> float:
        """Mean cross-entropy in nats, without the penalty."""
        return float(F.cross_entropy(self.scores(features), labels))


def fit_probe(features: Tensor, labels: Tensor, num_classes: int, l2: float) -> LinearProbe:
    """The minimum for one strength, in float64 from zeros: the same on every call.

    Args:
        features: `(n, dim)`.
        labels: `(n,)`.
        num_classes: of the task.
        l2: strength of the penalty on W, at least 0.
    """
    features = features.double()
    weight = torch.zeros(num_classes, features.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(num_classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=MAX_ITERATIONS, tolerance_grad=1e-9, tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(features @ weight.T + bias, labels) + l2 / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(objective)
    return LinearProbe(weight.detach(), bias.detach(), l2)


def best_probe(
    train: tuple[Tensor, Tensor], dev: tuple[Tensor, Tensor], num_classes: int, strengths: Sequence[float] = STRENGTHS
) -> LinearProbe:
    """Of the probes fitted to `train` that with the best dev accuracy, then the least dev loss.

    Args:
        train, dev: features `(n, dim)` and labels `(n,)`.
        num_classes: of the task.
        strengths: that are tried.
    """
    probes = [fit_probe(*train, num_classes, l2) for l2 in strengths]
    return max(probes, key=lambda probe: (probe.accuracy(*dev), -probe.loss(*dev)))
