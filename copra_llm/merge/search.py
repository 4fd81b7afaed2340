"""Which weights should adapters be merged with? Those with the least loss on a few examples, without gradients.

    min over w in [-1.5, 1.5]^n of loss(w) + 0.05 sum_i |w_i|

`loss` is the caller's: merge with these weights (task arithmetic takes any), evaluate on a few examples. An
evolution strategy with one parent and one child, whose step grows by success and shrinks by failure so that one in
five children succeeds, spends a fixed number of evaluations. LoraHub's own is a portfolio of such strategies.

Source: Huang et al., LoraHub (arXiv 2307.13269), section 3.3; Rechenberg's 1/5 rule as in Kern et al., Learning
probability distributions in continuous evolutionary algorithms (2004).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np


def search_weights(
    loss: Callable[[Sequence[float]], float],
    count: int,
    *,
    budget: int = 40,
    seed: int = 0,
    penalty: float = 0.05,
    bound: float = 1.5,
) -> tuple[list[float], float]:
    """Weights with a small penalised loss, and that value.

    Args:
        loss: of `count` weights, e.g. nats on a few examples; one that is not a number counts as the worst.
        count: adapters.
        budget: evaluations of `loss`; the first is of equal weights, 1 / count.
        seed: in [0, 2**64).
        penalty: of the sum of the weights' magnitudes.
        bound: of a weight's magnitude.
    """
    rng = np.random.Generator(np.random.Philox(key=seed))

    def value(weights: np.ndarray) -> float:
        found = float(loss(weights.tolist())) + penalty * float(abs(weights).sum())
        return math.inf if math.isnan(found) else found

    best = np.full(count, 1.0 / count)
    least, step = value(best), bound / 3
    for _ in range(budget - 1):
        child = np.clip(best + step * rng.standard_normal(count), -bound, bound)
        found = value(child)
        better = found <= least
        # exp(0.8 / d) and exp(-0.2 / d): at one success in five the step stays.
        step *= math.exp((0.8 if better else -0.2) / math.sqrt(count + 1))
        if better:
            best, least = child, found
    return best.tolist(), least
