"""What does an example look like to the model, and what of it is trained?

Trained tokens in green, or between [[ and ]] where there are no colours. Everything is shown as it is decoded, special
tokens too; control characters are written out, so that no text can steer the terminal.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from itertools import groupby, islice
from typing import TextIO

from copra_llm.tasks.instruct.encode import Encoded

GREEN, RESET = "\x1b[32m", "\x1b[0m"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def has_colours(stream: TextIO) -> bool:
    """Whether a stream is a terminal and `$NO_COLOR` (https://no-color.org) is unset or empty."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def preview(examples: Iterable[Encoded], tokenizer, n: int, *, colours: bool = False) -> str:
    """The first `n` examples as text, each below its place and its numbers of tokens.

    Args:
        examples: of `Encoder`.
        tokenizer: that made them.
        n: how many.
        colours: ANSI colours; otherwise brackets.
    """
    on, off = (GREEN, RESET) if colours else ("[[", "]]")
    shown = []
    for example in islice(examples, n):
        head = f"--- {example.place}: {int(example.trained.sum())} of {len(example)} tokens are trained"
        parts = (on + text + off if trained else text for text, trained in _runs(example, tokenizer))
        shown.append(f"{head}\n{''.join(parts)}\n")
    return "\n".join(shown)


def _runs(example: Encoded, tokenizer) -> list[tuple[str, bool]]:
    """Decoded text of neighbouring tokens that are alike in being trained."""
    runs, done, before = [], 0, ""
    for trained, tokens in groupby(example.trained.tolist()):
        done += len(list(tokens))
        # From the beginning each time: decoded alone, a part could lose the space that it begins with.
        through = tokenizer.decode(example.input_ids[:done], skip_special_tokens=False)
        runs.append((_CONTROL.sub(lambda match: repr(match[0])[1:-1], through[len(before) :]), trained))
        before = through
    return runs
