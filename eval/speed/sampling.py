"""How do a few steps stand for CopRA's whole schedule?

p(t) = min(4t / 3, 1) is taken at the middles of equal parts of the run, t = (k + 1/2) / steps: a short run of its own
would take each part's left end, where p is smaller. Few masks are a noisy sample, above all of how far down the
backward pass has to go while p is small. So of many mask seeds those are taken whose masks come nearest, in the mean
over the steps, to a long run's share of active layers and share of layers that the backward pass reaches.
"""

from collections.abc import Sequence

import numpy as np
from workloads import Workload

from copra_llm.gates import LayerGates
from copra_llm.masks import sample_mask
from copra_llm.schedule import METHODS

TRIED = 512
"""Seeds among which the best ones are taken."""
LONG = 2000
"""Steps of the run that they are to stand for."""


def sampled_schedule(steps: int) -> dict[str, float]:
    """Settings with which a run of `steps` steps has p at the middles; its mean is 5/8 for multiples of 4."""
    ramp = METHODS["copra"].ramp_fraction
    p_start = 0.5 / (ramp * steps)
    return {"p_start": p_start, "ramp_fraction": ramp * (1.0 - p_start)}


def step_masks(w: Workload, steps: int, seed: int) -> np.ndarray:
    """The masks `(steps, num_layers)` of such a run."""
    schedule = w.config.replace(method="copra", **sampled_schedule(steps)).schedule.schedule()
    return _masks(schedule, len(LayerGates(w.peft).keys), steps, seed)


def seeds_like_a_long_run(w: Workload, steps: int, count: int) -> list[int]:
    """The `count` of `TRIED` mask seeds, the best one first."""
    keys = LayerGates(w.peft).keys
    schedule = w.config.replace(method="copra", **sampled_schedule(steps)).schedule.schedule()
    aim = shares(keys, _masks(METHODS["copra"], len(keys), LONG, 0))
    apart = [np.abs(shares(keys, _masks(schedule, len(keys), steps, seed)) - aim).max() for seed in range(TRIED)]
    return [int(seed) for seed in np.argsort(apart, kind="stable")[:count]]


def shares(keys: Sequence[str], masks: np.ndarray) -> np.ndarray:
    """Mean over `masks (steps, num_layers)` of the shares `(2,)` of active layers, and of those that the backward pass
    reaches: in each tower the lowest active layer and all above."""
    towers = np.array([key.rsplit(".", 1)[0] for key in keys])
    reached = np.zeros_like(masks)
    for tower in set(towers):
        own = towers == tower
        reached[:, own] = np.logical_or.accumulate(masks[:, own], axis=1)
    return np.array([masks.mean(), reached.mean()])


def _masks(schedule, players: int, steps: int, seed: int) -> np.ndarray:
    return np.array([sample_mask(schedule(k / steps), players, seed=seed, step=k) for k in range(steps)])
