"""The frame of a plot: scales, ticks that are round numbers, grid lines, labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from copra_llm.report.markup import Html, el, joined, leaf

WIDTH = 360
"""Of every panel: as wide as a phone."""
TEXT = 12.5
"""Size of text; `page.css` sets the same."""


@dataclass(frozen=True)
class Drawing:
    """What is inside an SVG, and its size."""

    content: Html
    height: float
    width: float = WIDTH


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` -> places from `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return self.start + (self.stop - self.start) * ((value - self.low) / span if span else 0.5)

    def clamped(self, value: float) -> float:
        """Within the frame."""
        return self(min(max(value, self.low), self.high))


@dataclass(frozen=True)
class Box:
    """Where the frame lies in a panel."""

    left: float
    top: float
    right: float
    bottom: float


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers between `low` and `high`: multiples of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(m * power for m in (1, 2, 5, 10, 20) if span / (m * power) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_texts(values: Sequence[float]) -> list[str]:
    """With as many decimals as tell them apart, and no more."""
    for decimals in range(7):
        texts = [f"{v:.{decimals}f}" for v in values]
        if all(abs(float(t) - v) <= 1e-6 * max(abs(v), 1e-9) for t, v in zip(texts, values, strict=True)):
            return ["0" if float(t) == 0 else t for t in texts]
    return [f"{v:.3g}" for v in values]


def limits(values: Sequence[float], ends: Sequence[float] = (), *, within=(-math.inf, math.inf)) -> tuple[float, float]:
    """A range that shows all values, and the ends of intervals as far as these do not dwarf the values.

    Args:
        values: what must be seen; what is not finite is left out.
        ends: of intervals; they may take as much room above and below as the values themselves.
        within: what the quantity can be.
    """
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return (0.0, 1.0)
    low, high = min(finite), max(finite)
    room = max(high - low, 0.02 * max(abs(low), abs(high)), 1e-9)
    seen = [min(max(e, low - room), high + room) for e in ends if math.isfinite(e)]
    low, high = min([low, *seen]), max([high, *seen])
    pad = 0.06 * max(high - low, room)
    return max(low - pad, within[0]), min(high + pad, within[1])


def room(texts: Iterable[str]) -> float:
    """Width that the longest of some texts takes, in the widest of the usual fonts."""
    return max((sum(TEXT * _WIDTHS.get(c, 0.64) for c in text) for text in texts), default=0.0)


_WIDTHS = dict.fromkeys("ijlt.,:;'|!() []-", 0.41) | dict.fromkeys("mwMW%@…", 0.98)
"""Of characters, in ems, where they are not about average."""


def words(text: str, most: int) -> str:
    """A label that fits: cut in the middle, where names of modules say least."""
    if len(text) <= most:
        return text
    head = (most - 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def label(x: float, y: float, text: str, anchor: str | None = None, class_: str | None = None, **more) -> Html:
    """A piece of text."""
    return el("text", text, x=float(x), y=float(y), text_anchor=anchor, class_=class_, **more)


def y_axis(scale: Scale, box: Box, title: str) -> Html:
    """Grid lines with numbers, and the quantity above the frame, where it needs no turning of the head."""
    values = ticks(scale.low, scale.high)
    lines = "".join(f"M{box.left:.1f} {scale(v):.1f}H{box.right:.1f}" for v in values)
    texts = [
        label(box.left - 6, scale(v) + 4, t, "end") for v, t in zip(values, tick_texts(values), strict=True)
    ]  # fmt: skip
    return joined(leaf("path", class_="grid", d=lines), *texts, label(2.0, 13.0, title, class_="axis"))


def x_axis(scale: Scale, box: Box, title: str, values: Sequence[float] | None = None, grid: bool = False) -> Html:
    """Ticks with numbers below the frame, and the quantity below them."""
    values = ticks(scale.low, scale.high, 5) if values is None else values
    top = box.top if grid else box.bottom
    lines = "".join(f"M{scale(v):.1f} {top:.1f}V{box.bottom + (0 if grid else 4):.1f}" for v in values)
    texts = [
        label(scale(v), box.bottom + 17, t, "middle") for v, t in zip(values, tick_texts(values), strict=True)
    ]  # fmt: skip
    return joined(
        leaf("path", class_="grid" if grid else "frame", d=lines), *texts, x_title(box, title), base(box, box.bottom)
    )


def x_title(box: Box, title: str, below: float = 34) -> Html:
    return label((box.left + box.right) / 2, box.bottom + below, title, "middle", "axis")


def base(box: Box, y: float) -> Html:
    """The line from which bars rise, or the frame's lower edge."""
    return leaf("path", class_="frame", d=f"M{box.left:.1f} {y:.1f}H{box.right:.1f}")


def left_margin(scale_low: float, scale_high: float) -> float:
    """Room for the numbers of a y-axis."""
    return 10 + room(tick_texts(ticks(scale_low, scale_high)))
