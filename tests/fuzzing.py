"""What every fuzz test asks: it works, or it is refused by one sentence and leaves nothing behind.

Examples are drawn from a fixed seed, so that a run repeats itself; `make fuzz` draws many more.
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from copra_llm.cli import main
from copra_llm.errors import InputError

LONGEST = 20
"""Seconds that one example may take: hundreds of times what it does take, and less than a hang."""
LONGEST_SENTENCE = 1200
"""Characters; a path of the tests is some 150 of them."""


def efforts(quick: int, long: int = 3000):
    """The test's parameter `examples`: how many of them are drawn, in `make test` and in `make fuzz`."""
    return pytest.mark.parametrize(
        "examples", [quick, pytest.param(long, marks=pytest.mark.slow)], ids=["quick", "long"]
    )


def drawn(examples: int) -> settings:
    """Of a fixed seed; a failing example stands in the test, not in a folder of the machine."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    return settings(
        derandomize=True,
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=checks,
        # Not made smaller: where an example hangs, that would take minutes.
        phases=[Phase.explicit, Phase.generate],
    )


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Fails where the block does not end: Python's own matcher and loops hear signals."""

    def ring(signum, frame):
        raise TimeoutError(f"not over after {LONGEST} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def check_sentence(sentence: str) -> None:
    """One sentence of bounded length, with something that can be done."""
    assert sentence and "Traceback" not in sentence
    assert len(sentence) < LONGEST_SENTENCE, sentence
    assert any(word in sentence for word in ("; ", " must ", "see --help", "did you mean")), sentence


def refused(action: Callable[[], Any]) -> str | None:
    """The sentence by which an action is refused, None if it works; any other exception is the test's."""
    with in_time():
        try:
            action()
        except InputError as error:
            sentence = str(error)
        except OSError as error:
            # What the commands say of a path that the system refuses (`exit_on_input_error`).
            assert error.filename is not None
            return f"{error.filename}: {error.strerror}; give another path"
        else:
            return None
    check_sentence(sentence)
    return sentence


def copra(argv: list[str], output: Path) -> bool:
    """Whether a `copra` command works; where it does not, its code is 2, it says why, and `output` is not there."""
    said = io.StringIO()
    with in_time(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = main(argv)
    if code == 0:
        return True
    assert code == 2
    line = said.getvalue().splitlines()[-1]
    assert line.startswith("error: ")
    check_sentence(line)
    assert not output.exists()
    assert not [path.name for path in output.parent.iterdir() if path.name.startswith(f".{output.name}")]
    return False


# --- what is drawn ----------------------------------------------------------------------------------------

DEEP: Any = json.loads("[" * 400 + "]" * 400)
"""Nested less deep than Python's readers refuse, deeper than anything meant."""
ODD_NUMBERS = [0, -1, 1, 2, 3, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**400), 0.0, -0.5, 0.5, 1e308, 5e-324,
               float("nan"), float("inf"), -float("inf"), True, False]  # fmt: skip
ODD_TEXTS = ["", " ", "\x00", "\n", "a", "..", "../../outside", "/etc/passwd", "~", "*", "(", "[", "a{99999999999}",
             "(a+)+$", "(a|a)*b", ".*" * 30 + "x", "x" * 5000, "\ud800", "\U0001f600", "${HOME}", "{}", "{0.__class__}",
             "%s", "nan", "None", "null", "true", "1e3"]  # fmt: skip
odd_scalars = st.one_of(st.none(), st.sampled_from(ODD_NUMBERS), st.sampled_from(ODD_TEXTS), st.text(max_size=8))
odd_values = st.one_of(
    odd_scalars,
    st.just(DEEP),
    st.lists(odd_scalars, max_size=3),
    st.dictionaries(st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=5)), odd_scalars, max_size=3),
)
"""Values of JSON's kinds, most of them wrong anywhere."""


def dumped(value: Any) -> bytes:
    """JSON as other writers write it: NaN and lone surrogates too."""
    return json.dumps(value).encode("utf-8", "surrogatepass")


@st.composite
def spoilt(draw, content: bytes) -> bytes:
    """A file cut short, with bytes of its own replaced, or with something else in front or behind."""
    kind = draw(st.sampled_from(["cut", "bytes", "before", "after", "other"]))
    if kind == "cut":
        return content[: draw(st.integers(0, max(0, len(content) - 1)))]
    if kind == "bytes":
        spoiled = bytearray(content)
        for place, value in draw(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=6)):
            if spoiled:
                spoiled[place % len(spoiled)] = value
        return bytes(spoiled)
    other = draw(st.sampled_from([b"", b"\xff\xfe", b"\x80\x04K\x01.", b"PK\x03\x04", b"[" * 20_000, b"{" * 1000]))
    return other + content if kind == "before" else content + other if kind == "after" else other


def safetensors(entries: dict[str, tuple[str, tuple, bytes]], metadata: Any = None, length: int | None = None) -> bytes:
    """A safetensors file written by hand, so that it can lie.

    Args:
        entries: key -> (type, shape, bytes).
        metadata: `__metadata__`; None: without.
        length: that the file says its header has; None: the true one.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    place, body = 0, b""
    for key, (dtype, shape, content) in entries.items():
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + len(content)]}
        place, body = place + len(content), body + content
    text = dumped(header)
    return struct.pack("<Q", len(text) if length is None else length) + text + body
