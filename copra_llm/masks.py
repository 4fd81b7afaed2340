"""Which layers' adapters take part in a step?

    delta_l ~ Bernoulli(p), independent per layer l, conditioned on at least one active layer.

A step with no active layer would have no gradient (and p(0) = 0 in the paper), hence the condition. It is
drawn exactly, in one pass: while no layer is active yet and m layers are left (this one included),

    P(delta_l = 1) = p / (1 - (1 - p)^m) = p / (-expm1(m * log1p(-p))),        1 / m at p = 0,

and plain Bernoulli(p) after the first active one. The marginal is p / (1 - (1 - p)^L) for every layer. Where layers
have probabilities p_l of their own, the product of the 1 - p_l of the layers left stands for (1 - p)^m.

The mask is a pure function of (seed, step): Philox with key = seed and the step in its counter. So every
rank, machine and resumed run sees the same mask, nothing has to be saved, and no global generator moves.

Source: CopRA (arXiv 2410.22911), equation 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def sample_mask(p: float | Sequence[float], num_layers: int, *, seed: int, step: int) -> np.ndarray:
    """The mask of one optimizer step.

    Args:
        p: activation probability in [0, 1], or one a layer.
        num_layers: number of players, at least 1.
        seed: mask seed in [0, 2**64).
        step: optimizer step in [0, 2**64).

    Returns:
        bool array `(num_layers,)`, True = active, never all False.

    Raises:
        ValueError: if `p` or `num_layers` is out of range.
    """
    return _conditioned(_of_layers(p, num_layers), _uniforms(num_layers, seed, step))


def sample_masks(p: float | Sequence[float], num_layers: int, count: int, *, seed: int, step: int) -> np.ndarray:
    """Masks of a step's examples, independent of each other and of `sample_mask`'s; each never empty.

    Example i's is a pure function of (seed, step, i): it does not depend on how many there are.

    Args:
        p, num_layers, seed, step: as in `sample_mask`.
        count: number of examples.

    Returns:
        bool array `(count, num_layers)`.
    """
    probs = _of_layers(p, num_layers)
    return np.array([_conditioned(probs, _uniforms(num_layers, seed, step, i + 1)) for i in range(count)])


def _conditioned(probs: Sequence[float], uniforms: np.ndarray) -> np.ndarray:
    """The mask that these numbers in [0, 1) stand for, by the head's law."""
    num_layers = len(probs)
    alike = all(q == probs[0] for q in probs)
    mask = np.zeros(num_layers, dtype=bool)
    any_active = False
    for layer, u in enumerate(uniforms):
        if any_active:
            limit = probs[layer]
        elif alike:
            limit = _first_active_prob(probs[layer], num_layers - layer)
        else:
            limit = _first_of_unequal(probs[layer:])
        mask[layer] = u < limit
        any_active = any_active or bool(mask[layer])
    return mask


def marginal_prob(p: float, num_layers: int) -> float:
    """P(delta_l = 1) of one layer under the conditioned law: p / (1 - (1 - p)^L), and 1 / L at p = 0."""
    return _first_active_prob(p, num_layers)


def marginal_probs(p: Sequence[float]) -> list[float]:
    """P(delta_l = 1) of every layer under the conditioned law: p_l / (1 - prod_j (1 - p_j)); 1 / L where all are 0."""
    probs = _of_layers(p, len(p))
    return [_first_of_unequal([probs[i], *probs[:i], *probs[i + 1 :]]) for i in range(len(probs))]


def _of_layers(p: float | Sequence[float], num_layers: int) -> list[float]:
    probs = [p] * num_layers if isinstance(p, int | float) else list(p)
    if num_layers < 1 or len(probs) != num_layers or not all(0.0 <= q <= 1.0 for q in probs):
        raise ValueError(f"p must lie in [0, 1], once or for each layer, and num_layers be positive, not p={p}, "
                         f"num_layers={num_layers}")  # fmt: skip
    return probs


def _first_active_prob(p: float, remaining: int) -> float:
    """P(delta = 1) of the first of `remaining` layers, if none has been active before."""
    if p == 0.0:
        return 1.0 / remaining
    if p == 1.0 or remaining == 1:
        return 1.0
    return p / -math.expm1(remaining * math.log1p(-p))


def _first_of_unequal(left: Sequence[float]) -> float:
    """The same of the first of these layers."""
    # Not the sum below where it need not be: masks of one probability are the same on every machine, to the bit.
    if all(q == left[0] for q in left):
        return _first_active_prob(left[0], len(left))
    return left[0] if 1.0 in left else left[0] / -math.expm1(sum(math.log1p(-q) for q in left))


def _uniforms(n: int, seed: int, step: int, stream: int = 0) -> np.ndarray:
    """`n` doubles in [0, 1) from Philox(key=seed, counter=(step, stream)).

    The step goes into the counter's second word: the generator itself counts blocks of four in the first
    word, so steps in neighbouring first words would share their numbers. The stream goes into the fourth, since other
    modules number theirs in the third. Raw words are scaled here, since NumPy promises stable raw streams but not
    stable distributions over them.
    """
    raw = np.random.Philox(key=seed, counter=int(step) << 64 | int(stream) << 192).random_raw(n)
    return (raw >> np.uint64(11)) * 2.0**-53
