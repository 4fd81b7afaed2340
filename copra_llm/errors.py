"""What is said, and how does the process end, when the input is wrong?

One sentence that names the place and the remedy, on standard error, exit code 2.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable


class InputError(ValueError):
    """Something the caller gave is wrong; the message is one sentence with the place and the remedy."""


def nearest(word: str, known) -> str:
    """`' (did you mean "X"?)'` for the known word closest to `word`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""


def exit_on_input_error(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's `main`: an `InputError` becomes one line on stderr and the return value 2."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except InputError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2

    return wrapped
