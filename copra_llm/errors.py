"""What is said, and how does the process end, when the input is wrong?

One sentence that names the place and the remedy, on standard error, exit code 2.
"""

from __future__ import annotations

import errno
import functools
import logging
import sys
from collections.abc import Callable

PREEMPTED_EXIT_CODE = 143
"""What a shell gives a process that SIGTERM has ended: 128 + 15."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(ValueError):
    """Something the caller gave is wrong; the message is one sentence with the place and the remedy."""


class Preempted(Exception):
    """The run was asked to stop (SIGTERM) and has saved a checkpoint; the message says how it goes on."""


class LostProcess(Exception):
    """Another process of the run is gone; the message says how it goes on."""


class ToldElsewhere(Exception):
    """The run ends here because of what its main process has met, and says."""


def nearest(word: str, known) -> str:
    """`' (did you mean "X"?)'` for the known word closest to `word`, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.6)
    return f' (did you mean "{close[0]}"?)' if close else ""


def shown(value: object) -> str:
    """A value as a sentence shows it: whole where it is short, else its beginning; of something nested its upper parts.

    A file of settings can be small and what it stands for beyond measure.
    """
    import reprlib

    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    try:
        return short.repr(value)
    except ValueError:  # Python writes no numeral of thousands of digits
        return "a number without measure"


def named(value: object, quote: str = '"') -> str:
    """A name that somebody else has chosen, in quotes; as `shown` where it is no short line of text."""
    plain = isinstance(value, str) and len(value) <= 80 and value.isprintable()
    return f"{quote}{value}{quote}" if plain else shown(value)


def exit_on_input_error(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's `main`: an `InputError` becomes one line on stderr and the return value 2, `Preempted` 143.

    A path that the operating system refuses is wrong input too: a file where a folder must be, no permission to write,
    no room. A `LostProcess` is no wrong input: 1.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        # Where it is installed, PEFT imports it, and it warns of a kernel that nothing here uses.
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        try:
            return main(*args, **kwargs) or 0
        except Preempted as stopped:
            print(stopped, file=sys.stderr)
            return PREEMPTED_EXIT_CODE
        except LostProcess as lost:
            print(f"error: {lost}", file=sys.stderr)
            return 1
        except ToldElsewhere:
            return 2
        except InputError as error:
            sentence = str(error)
        except OSError as error:
            if error.filename is None:
                raise
            remedy = "make room there, or give another path" if error.errno in _NO_ROOM else "give another path"
            sentence = f"{error.filename}: {error.strerror}; {remedy}"
        print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
        return 2

    return wrapped
