"""The search for merging weights: its budget, its minimum, its determinism."""

from __future__ import annotations

import math

import numpy as np
import pytest
from examples import random_adapter

from copra_llm.merge import merge
from copra_llm.merge.search import search_weights


@pytest.mark.parametrize("seed", range(5))
def test_finds_the_weights_a_merge_was_made_with(seed):
    """Loss: distance of a task-arithmetic merge from one with known weights; 200 evaluations."""
    adapters, wanted = [random_adapter(i) for i in range(3)], [0.9, -0.4, 0.3]
    name = next(iter(adapters[0].factors))
    adapters = [a.with_factors({name: a.factors[name]}, a.source) for a in adapters]
    target = merge(adapters, "task-arithmetic", wanted).factors[name].delta_weight()

    def loss(weights) -> float:
        return float((merge(adapters, "task-arithmetic", weights).factors[name].delta_weight() - target).norm())

    found, value = search_weights(loss, 3, budget=200, seed=seed, penalty=0.0)
    assert np.allclose(found, wanted, atol=0.02) and value == pytest.approx(loss(found))


def test_spends_its_budget_and_returns_the_best_it_saw():
    seen = []

    def loss(weights) -> float:
        seen.append(weights)
        return math.nan if len(seen) % 3 == 0 else sum((w - 0.3) ** 2 for w in weights)

    found, value = search_weights(loss, 4, budget=25, seed=1)
    assert len(seen) == 25 and seen[0] == [0.25] * 4
    assert max(abs(w) for weights in seen for w in weights) <= 1.5
    values = [sum((w - 0.3) ** 2 for w in weights) + 0.05 * sum(map(abs, weights)) for weights in seen]
    assert value == pytest.approx(min(v for i, v in enumerate(values, 1) if i % 3)) and found in seen


def test_is_a_function_of_its_seed():
    def loss(weights) -> float:
        return sum(w * w for w in weights)

    assert search_weights(loss, 2, seed=3) == search_weights(loss, 2, seed=3) != search_weights(loss, 2, seed=4)


def test_the_penalty_drops_what_does_not_help():
    """(w_1 - 1)^2 + 0.05 (|w_1| + |w_2|) is least at (0.975, 0); the second weight starts at 1/2."""
    found, _ = search_weights(lambda w: (w[0] - 1.0) ** 2, 2, budget=300)
    assert found == pytest.approx([0.975, 0.0], abs=0.02)
