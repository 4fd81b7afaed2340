"""How does a rule work on Delta W itself, entry by entry, in bounded memory?

    block of lines of every Delta W_i -> the rule -> block of the merged X,      two passes:
    1.  G = sum over blocks of X_b^T X_b = V D V^T        (G has the shorter side of Delta W)
    2.  X V_r, block by block;  the result is (X V_r) V_r^T, the best approximation of rank r
    lost = sqrt(||X||^2 - ||X V_r||^2)

X is no sum of low-rank matrices any more, so a rank must be chosen, and what is lost by it is said. A line is
a row, or a column where Delta W has more columns than rows: so G is as small as can be. Held at a time are one
block of every adapter and G: 8 min(out, in)^2 bytes, 134 MB for 4096, whatever the other side and the number of
adapters. Squaring X makes singular values below 1e-8 of the largest one inexact; those are lost in any cut.

Source: Golub and Van Loan, Matrix Computations, 4th ed., section 8.6 (singular values by the Gram matrix).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from copra_llm.adapters import LoraFactors
from copra_llm.merge.lowrank import balanced

BLOCK = 1 << 21
"""Entries of one adapter's block: 16 MiB in float64."""


class Deltas:
    """Delta W of several adapters for one module, read in blocks of lines.

    Args:
        factors: one module's, of any ranks.
        block: entries of a block.
    """

    def __init__(self, factors: Sequence[LoraFactors], block: int = BLOCK):
        self.like = factors[0]
        rows, columns = len(self.like.lora_B), self.like.lora_A.shape[1]
        self.turned = columns > rows
        self.lines, self.length = max(rows, columns), min(rows, columns)
        self.step = max(1, block // self.length)
        lefts = [f.lora_A.T if self.turned else f.lora_B for f in factors]  # (lines, r)
        rights = [f.lora_B.T if self.turned else f.lora_A for f in factors]  # (r, length)
        self.pairs = [
            (f.scaling * left.double(), right.double()) for f, left, right in zip(factors, lefts, rights, strict=True)
        ]

    @property
    def size(self) -> int:
        return self.lines * self.length

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """First line, and all adapters' blocks from there `(n, lines of the block, length)`."""
        for first in range(0, self.lines, self.step):
            yield first, torch.stack([left[first : first + self.step] @ right for left, right in self.pairs])

    def kth_largest(self, adapter: int, k: int) -> float:
        """The k-th largest magnitude of one adapter's Delta W, exactly.

        A float64 that is not negative has the order of its bit pattern. So the pattern is found 16 bits at a
        time: count the blocks' entries by those bits, and go on among those that share the k-th one's.
        """
        left, right = self.pairs[adapter]
        pattern = 0
        for shift in (48, 32, 16, 0):
            counts = torch.zeros(1 << 16, dtype=torch.int64)
            for first in range(0, self.lines, self.step):
                bits = (left[first : first + self.step] @ right).abs().view(torch.int64).flatten()
                if shift < 48:
                    bits = bits[(bits >> (shift + 16)) == pattern]
                counts += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16)
            at_least = counts.flip(0).cumsum(0).flip(0)  # entries whose 16 bits are these or larger
            digit = int((at_least >= k).sum()) - 1
            k -= int(at_least[digit] - counts[digit])
            pattern = pattern << 16 | digit
        return float(torch.tensor([pattern]).view(torch.float64))

    def merged(self, rule: Callable[[int, Tensor], Tensor], rank: int, note=None) -> LoraFactors:
        """The best approximation of what the rule makes, of at most `rank`.

        Args:
            rule: `(first line, (n, lines, length)) -> (lines, length)`; called twice for every block.
            rank: of the result.
            note: gets `lost` and `whole`, norms of what is cut off and of what it is cut from.
        """
        gram = torch.zeros(self.length, self.length, dtype=torch.float64)
        for first, block in self.blocks():
            lines = rule(first, block)
            gram.addmm_(lines.T, lines)
        V = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]  # (length, r)
        X = torch.cat([rule(first, block) @ V for first, block in self.blocks()])  # (lines, r)
        whole = float(gram.trace())
        if note is not None:
            note(lost=math.sqrt(max(0.0, whole - float((X**2).sum()))), whole=math.sqrt(whole))
        S = torch.linalg.vector_norm(X, dim=0)
        left, right = X / S.clamp_min(torch.finfo(S.dtype).tiny), V
        return balanced(right, S, left.T, self.like) if self.turned else balanced(left, S, right.T, self.like)
