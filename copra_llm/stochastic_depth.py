"""What if whole blocks are left out of a step, and not their adapters alone? The ablation of plain LoRA.

    x_{l+1} = x_l + (b_l / q_l) (f_l(x_l) - x_l),    b_l ~ Bernoulli(q_l),    q_l = 1 - D (l + 1) / L

A block that is left out gives what it was given; one that stays counts 1 / q_l times, so that evaluation, with all of
them, needs no correction. l counts a tower's adapted blocks from 0, L is their number and D the drop rate of the last.
Blocks are drawn once an optimizer step, a pure function of (seed, step), so every process sees the same ones.

Source: Huang et al., Deep Networks with Stochastic Depth (arXiv 1603.09382), section 3, whose correction is made at
evaluation instead.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
from torch import Tensor, nn

from copra_llm.errors import InputError
from copra_llm.gates import base_name
from copra_llm.replaced import replaced_forward

USE = 7
"""Counter word 2, where the other streams of random numbers have other numbers."""


class StochasticDepth:
    """Blocks of a model, and how likely each is to stay.

    Args:
        model: with adapters; None of its blocks has been replaced.
        keys: names of its adapted blocks, in the order of their towers and numbers (`LayerGates.keys`).
        drop: rate D in (0, 1) of a tower's last block; None: nothing is ever left out.
        seed: of the draws, in [0, 2**64).

    Raises:
        InputError: if a key names no block.
    """

    def __init__(self, model: nn.Module, keys: Sequence[str], drop: float | None, seed: int):
        keys = keys if drop is not None else []
        self.seed, self.survival = seed, survival(keys, drop or 0.0)
        named = {base_name(name): module for name, module in model.named_modules()} if keys else {}
        missing = next((key for key in keys if key not in named), None)
        if missing is not None:
            raise InputError(f"--stochastic_depth needs blocks, but {missing} is none; leave out --layer_pattern")
        self.blocks = [named[key] for key in keys]

    @contextmanager
    def applied(self, step: int) -> Iterator[None]:
        """The step's blocks are left out of forward passes in training mode; afterwards all are as they were."""
        with ExitStack() as stack:
            for block, q, stays in zip(self.blocks, self.survival, self.draw(step), strict=True):
                stack.enter_context(replaced_forward(block, _Thinned(block, q, stays)))
            yield

    def draw(self, step: int) -> np.ndarray:
        """Which blocks stay, bool `(blocks,)`: at least the first, without which a step might have no gradient."""
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, step, USE, 0]))
        stays = rng.random(len(self.survival)) < self.survival
        if len(stays) and not stays.any():
            stays[0] = True
        return stays


class _Thinned:
    """A block's forward pass for one step."""

    def __init__(self, block: nn.Module, q: float, stays: bool):
        self.block, self.run, self.q, self.stays = block, block.forward, q, stays

    def __call__(self, *args, **kwargs) -> Tensor:
        if not self.block.training:
            return self.run(*args, **kwargs)
        entered = args[0] if args else kwargs["hidden_states"]
        if not self.stays:
            return entered
        left = self.run(*args, **kwargs)
        if not isinstance(left, Tensor):
            raise InputError(f"--stochastic_depth needs blocks that give hidden states alone, but "
                             f"{type(self.block).__name__} gives a {type(left).__name__}; leave it out")  # fmt: skip
        return entered + (left - entered) / self.q


def survival(keys: Sequence[str], drop: float) -> list[float]:
    """`q_l` of each block; towers are told apart by what stands before the block's number."""
    towers = [re.sub(r"\d+$", "", key) for key in keys]
    depth, seen = Counter(towers), Counter()
    chances = []
    for tower in towers:
        seen[tower] += 1
        chances.append(1.0 - drop * seen[tower] / depth[tower])
    return chances


def thinned(module: nn.Module) -> bool:
    """Whether blocks may be missing from this module's forward pass now."""
    return isinstance(vars(module).get("forward"), _Thinned)
