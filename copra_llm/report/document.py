"""What a page is made of: sections of figures and tables, each with its words, its numbers and its CSV."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from copra_llm.report.markup import Html, el, joined, slug
from copra_llm.report.plots.axes import Drawing
from copra_llm.report.plots.marks import swatch
from copra_llm.report.tables import Table, html_table


@dataclass(frozen=True)
class Panel:
    """One plot, and what it shows in words with its main numbers."""

    title: str
    words: str
    drawing: Drawing


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    name: str
    style: int
    kind: str = "line"
    """"line", "bar" or "marker"."""
    hollow: bool = False


@dataclass(frozen=True)
class Figure:
    """Panels of one kind with one legend, and the numbers they are drawn from."""

    title: str
    note: str
    """How to read it."""
    panels: Sequence[Panel]
    table: Table
    keys: Sequence[Key] = ()
    unfolded: bool = False
    """Whether the numbers stand open: what readers come for."""


@dataclass(frozen=True)
class Folded:
    """Tables that few readers need at once."""

    title: str
    tables: Sequence[Table]


Block = Figure | Table | Folded


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    blocks: Sequence[Block] = field(default_factory=list)

    @property
    def tables(self) -> list[Table]:
        """All of them, those behind figures too."""
        found: list[Table] = []
        for block in self.blocks:
            found += block.tables if isinstance(block, Folded) else [getattr(block, "table", block)]
        return found


def keys_of(style: Mapping[str, int], names: Iterable[str], kind: str = "line") -> list[Key]:
    """A legend's entries, each name once, in the order of their styles."""
    return [Key(name, style[name], kind) for name in sorted(set(names), key=lambda name: style[name])]


def section_html(section: Section, ids: Iterator[str]) -> tuple[str, Html]:
    """The section's id and its markup; `ids` yields endings that are used nowhere else."""
    name = f"{slug(section.title)}-{next(ids)}"
    blocks = [block_html(block, next(ids)) for block in section.blocks]
    head = el("h2", section.title, id=f"{name}-h")
    return name, el(
        "section", head, el("p", section.text) if section.text else None, *blocks, id=name, aria_labelledby=f"{name}-h"
    )


def block_html(block: Block, ending: str) -> Html:
    if isinstance(block, Figure):
        return figure_html(block, ending)
    if isinstance(block, Table):
        return html_table(block, f"t{ending}")
    tables = [html_table(t, f"t{ending}n{i}") for i, t in enumerate(block.tables)]
    return el("details", el("summary", block.title), *tables)


def figure_html(figure: Figure, ending: str) -> Html:
    """Heading, legend, panels, then everything in words and numbers."""
    title = el("h3", figure.title, id=f"f{ending}")
    panels = [
        el("div", el("h4", panel.title, id=f"f{ending}p{i}"), svg(panel, f"f{ending}d{i}"), class_="panel")
        for i, panel in enumerate(figure.panels)
    ]
    said = [
        el("p", el("strong", f"{panel.title}: "), panel.words, id=f"f{ending}d{i}")
        for i, panel in enumerate(figure.panels)
    ]
    what = "In words" if figure.unfolded else "In words and numbers"
    summary = el("summary", what, el("span", f": {figure.title}", class_="hidden"))
    numbers = html_table(figure.table, f"t{ending}")
    return el(
        "figure",
        el("figcaption", title, el("p", figure.note)),
        legend(figure.keys),
        el("div", *panels, class_="panels" if len(panels) > 1 else "panels one"),
        numbers if figure.unfolded else None,
        el("details", summary, *said, None if figure.unfolded else numbers),
        aria_labelledby=f"f{ending}",
    )


def svg(panel: Panel, described_by: str) -> Html:
    """The drawing as an image with its text alternative."""
    d = panel.drawing
    return el(
        "svg", d.content, class_="plot", viewBox=f"0 0 {d.width:g} {d.height:.0f}", role="img",
        aria_label=f"{panel.title}: {panel.words}", aria_details=described_by,
    )  # fmt: skip


def legend(keys: Sequence[Key]) -> Html | None:
    """Each series' mark beside its name."""
    if not keys:
        return None
    entries = [el("li", swatch(k.style, k.kind, k.hollow), el("span", k.name)) for k in keys]
    return el("ul", joined(*entries), class_="legend", aria_label="Legend")
