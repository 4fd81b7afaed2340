"""What did a merge cost: how far is the written Delta W from the one that was wanted?

Some rules have figures beside their factors: what cutting to a rank lost, how much an alignment gained. They
give them by name, a number a module; here the modules are put together:

    ||Delta W||_F over all modules = sqrt(sum over modules of ||Delta W_module||_F^2)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Figures:
    """Numbers of a merge, filled by `copra_llm.merge.merge(..., figures=...)`."""

    modules: dict[str, dict[str, float]] = field(default_factory=dict)
    """By module, then by name: `lost`, `whole`; `objective_before`, `gap_after`, ..."""

    def of(self, module: str) -> Callable[..., None]:
        """`note(name=number, ...)` for one module."""
        return functools.partial(self._note, module)

    def _note(self, module: str, **numbers: float) -> None:
        self.modules.setdefault(module, {}).update(numbers)

    def total(self, name: str) -> float:
        """A sum over the modules that have it."""
        return sum(own[name] for own in self.modules.values() if name in own)

    def norm(self, name: str) -> float:
        """The norm over the modules of norms of single modules."""
        return math.sqrt(sum(own[name] ** 2 for own in self.modules.values() if name in own))

    def __contains__(self, name: str) -> bool:
        return any(name in own for own in self.modules.values())

    def sentences(self) -> list[str]:
        """What there is to say, a line each."""
        lines = []
        if "lost" in self:
            share = self.norm("lost") / self.norm("whole") if self.norm("whole") else 0.0
            lines.append(f"cut to the rank: lost {100 * share:.3g} % of the merged update's Frobenius norm")
        if "gap_before" in self:
            for name, what in (("objective", "sum of norms"), ("squares", "sum of squares")):
                before, after = (self.total(f"{name}_{when}") for when in ("before", "after"))
                lines.append(f"alignment, {what}: {before:.6g} before, {after:.6g} after")
            gaps = " before, ".join(f"{self.norm(f'gap_{when}'):.6g}" for when in ("before", "after"))
            lines.append(f"gap to the mixture: {gaps} after (the mixture's norm is {self.norm('mixture'):.6g})")
        return lines
