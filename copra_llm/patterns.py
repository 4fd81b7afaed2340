"""Can a regular expression that came with a file be matched in a bounded time?

Python's matcher goes back over every way to divide a text among repetitions. A repeated group makes them exponentially
many in the text's length, n repetitions its n-th power; there is no limit that could be set on its time.
"""

from __future__ import annotations

import re

MOST_REPETITIONS = 16
"""Of a pattern for the names of a model's modules, such as those that training tools write."""


def pattern_fault(pattern: str, most: int = MOST_REPETITIONS) -> str | None:
    """What is wrong with a regular expression, as the end of "..., which ..."; None: nothing.

    Args:
        pattern: for the names of modules.
        most: repetitions (`*`, `+`, `{`) that it may have.
    """
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression ({error})"
    plain = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", pattern, flags=re.DOTALL)
    if re.search(r"\)[*+{]", plain):
        return "repeats a group, for which matching may never end"
    if len(re.findall(r"[*+{]", plain)) > most:
        return f"has more than {most} repetitions, for which matching may never end"
    return None
