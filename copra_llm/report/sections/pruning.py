"""What is left of the accuracy when part of an adapter is taken away."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from copra_llm.estimates import Estimate, seed_estimate
from copra_llm.figures.groups import Group, by_place, styles
from copra_llm.figures.pruning import Variant, outcomes, pruning_groups
from copra_llm.report.document import Figure, Panel, Section, keys_of
from copra_llm.report.plots.bars import Bars, bars_in_words, lying_bars
from copra_llm.report.plots.lines import Line, line_plot
from copra_llm.report.tables import GROUP_COLUMNS, Table, table
from copra_llm.results import Result

KINDS = {
    "structured": "Whole modules taken away",
    "unstructured": "Entries taken away",
    "quantised": "Adapter in fewer bits",
}


def pruning_section(results: Sequence[Result]) -> Section | None:
    groups = pruning_groups(results)
    if not groups:
        return None
    blocks: list[Figure | Table] = []
    for kind, draw in (("structured", _bars), ("unstructured", _curves), ("quantised", _bars)):
        having = [g for g in groups if any(key[0] == kind for key in outcomes(g))]
        if having:
            blocks.append(_figure(kind, having, draw))
    known = {key[0] for g in groups for key in outcomes(g)}
    if known - set(KINDS):
        others = sorted(known - set(KINDS))
        blocks.append(_table(f"Pruned otherwise: {', '.join(others)}", groups, lambda kind: kind in others))
    text = (
        "Accuracy in percent of what is left. Density is the fraction kept. Early is the checkpoint at a quarter of "
        "the run. Means over seeds with 95 % intervals (Student's t)."
    )
    return Section("Pruning", text, blocks)


def _estimate(rows: Sequence[dict], name: str = "accuracy") -> Estimate | None:
    values = [row[name] for row in rows if row.get(name) is not None]
    return seed_estimate(values) if values else None


def _figure(kind: str, groups: Sequence[Group], draw: Callable) -> Figure:
    style = styles(g.name for g in groups)
    panels = [panel for title, here in by_place(groups) for panel in draw(kind, title, here, style)]
    notes = {
        "structured": "Each name says what is kept, or which module alone.",
        "unstructured": "The smallest entries of A and B are set to 0 (or random ones, where it says so).",
        "quantised": "Bytes are what the adapter would take in that form.",
    }
    keys = keys_of(style, [g.name for g in groups], "line" if kind == "unstructured" else "bar")
    made = _table(f"Pruning, {kind}", groups, lambda k: k == kind)
    return Figure(KINDS[kind], notes[kind], panels, made, keys)


def _bars(kind: str, title: str, here: Sequence[Group], style: dict[str, int]) -> list[Panel]:
    """One panel: a row a kind of pruning, a bar a method."""
    found = [outcomes(g) for g in here]
    cases = list(dict.fromkeys(key for o in found for key in o if key[0] == kind))
    names = _names(cases)
    series = [
        Bars(g.name, style[g.name], [_estimate(o[case]) if case in o else None for case in cases])
        for g, o in zip(here, found, strict=True)
    ]
    words = f"Accuracy in percent. {bars_in_words(series, names)}."
    return [Panel(title, words, lying_bars(series, names, "accuracy [%]", limit=(0, 100)))]


def _curves(kind: str, title: str, here: Sequence[Group], style: dict[str, int]) -> list[Panel]:
    """A panel a way of choosing the entries, a line a method over the densities."""
    panels = []
    for name in dict.fromkeys(key[1] for g in here for key in outcomes(g) if key[0] == kind):
        lines, said = [], []
        for g in here:
            found = {key[2]: _estimate(rows) for key, rows in outcomes(g).items() if key[:2] == (kind, name)}
            densities = sorted(d for d, e in found.items() if d is not None and e is not None)
            if densities:
                lines.append(Line(g.name, style[g.name], densities, [found[d] for d in densities]))
                values = ", ".join(f"{found[d]:.1f} at {d:g}" for d in densities)
                said.append(f"{g.name} {values}")
        drawing = line_plot(lines, "density (fraction kept)", "accuracy [%]", within=(0, 100), bars=True)
        panels.append(Panel(f"{title}: {name}", f"Accuracy in percent by density. {'; '.join(said)}.", drawing))
    return panels


def _names(cases: Sequence[Variant]) -> list[str]:
    """Names of cases; with the density where a name has several."""
    several = {name for _, name, _ in cases if sum(other == name for _, other, _ in cases) > 1}
    return [f"{name} at {density:g}" if name in several and density is not None else name for _, name, density in cases]


def _table(caption: str, groups: Sequence[Group], wanted: Callable[[str], bool]) -> Table:
    rows = [
        (*g.heads, g.values[0], name, density, len(found),
         _estimate(found), _estimate(found, "loss"), found[0].get("parameters"), found[0].get("bytes"))
        for g in groups
        for (kind, name, density), found in outcomes(g).items()
        if wanted(kind)
    ]  # fmt: skip
    columns = [
        *GROUP_COLUMNS, ("split",), ("pruning",), ("density", ".3g"), ("seeds", "d"), ("accuracy", ".1f"),
        ("loss", ".2f"), ("parameters", ",d"), ("bytes", ",.0f"),
    ]  # fmt: skip
    return table(caption, columns, rows, 3, "Accuracies in percent, losses in nats.")
