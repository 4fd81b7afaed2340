"""Which modules of a dual encoder belong to which tower, and which of them can have an adapter?

The classes of transformers name what is on the text side `text_...` (`text_model`, `text_projection`) and what is on
the image side `vision_...` or `visual_...`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

_BEGINNINGS = {"text": ("text_",), "vision": ("vision_", "visual_")}
_NOT_ADAPTED = {
    # SigLIP pools its patches with torch's own attention, which reads its weights past any adapter.
    "both": r"vision_model\.head\..*",
    "vision": r"text_.*|vision_model\.head\..*",
    "text": r"(vision|visual)_.*",
}


def tower(base: nn.Module, side: str) -> dict[str, nn.Module]:
    """The modules of one side of a dual encoder, "text" or "vision", by name."""
    return {name: module for name, module in base.named_children() if name.startswith(_BEGINNINGS[side])}


def not_adapted(encoder: str, names: Iterable[str], targets: list[str] | str) -> str | None:
    """The regular expression of what gets no adapter though the targets name it; None if there is no such module.

    Args:
        encoder: which towers get adapters: "both", "vision" or "text".
        names: of the modules that could have one.
        targets: PEFT's `target_modules`: the ends of their names, or "all-linear".
    """
    pattern = _NOT_ADAPTED[encoder]
    named = [name for name in names if targets == "all-linear" or name.endswith(tuple(targets))]
    # PEFT warns of a pattern that leaves out nothing.
    return pattern if any(re.fullmatch(pattern, name) for name in named) else None
