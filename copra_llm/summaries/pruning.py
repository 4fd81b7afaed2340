"""What do the pruning records say? Two tables and a plot, made from the records alone.

Means over seeds with 95 % intervals (Student's t). What is compared is compared seed by seed, since runs of one seed
share initialisation and data order: a variant with the whole adapter, and a method with LoRA.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from copra_llm.report import COLOURS, NAMES, ORDER, Estimate, require_matplotlib, seed_estimate
from copra_llm.report.curves import save_figure
from copra_llm.results import Result

LAYERS = ("every-other", "low", "middle", "high")
"""Structured variants that every adapter of some depth has; their mean is one number for a method."""
DENSITIES = (0.5, 0.3, 0.1)
"""Of the entries with the largest magnitude, shown in the short table."""


@dataclass(frozen=True)
class Series:
    """The adapters of one model, method and checkpoint, of one task or averaged over several."""

    model: str
    task: str
    method: str
    early: bool
    records: dict[int, tuple[Result, ...]]
    """By seed, one a task."""

    @property
    def name(self) -> str:
        return f"{'Early ' if self.early else ''}{NAMES.get(self.method, self.method)}"

    def accuracy(self, name: str, density: float = 1.0) -> dict[int, float]:
        """Percent by seed; empty if a record has not this variant."""
        means = {}
        for seed, records in self.records.items():
            rows = [row for r in records for row in r.data["rows"] if (row["name"], row["density"]) == (name, density)]
            if len(rows) == len(records):
                means[seed] = sum(row["accuracy"] for row in rows) / len(rows)
        return means if means.keys() == self.records.keys() else {}

    def drop(self, name: str, density: float = 1.0) -> dict[int, float]:
        """What the variant loses of the whole adapter's accuracy, in percentage points by seed."""
        return minus(self.accuracy("all"), self.accuracy(name, density))

    def over_layers(self, value: Callable[[str], dict[int, float]]) -> dict[int, float]:
        """Mean of a value over `LAYERS`, by seed; empty if one is missing."""
        parts = [value(name) for name in LAYERS]
        return {s: sum(part[s] for part in parts) / len(parts) for s in self.records} if all(parts) else {}

    def variants(self) -> list[tuple[str, str, float]]:
        """(kind, name, density) of every row, as the first record has them."""
        rows = next(iter(self.records.values()))[0].data["rows"]
        return [(row["kind"], row["name"], row["density"]) for row in rows]


def pruning_series(results: Iterable[Result]) -> list[Series]:
    """The pruning records by model, task, method, checkpoint and settings, in the order of the tables."""
    groups: dict[tuple, dict[int, tuple[Result, ...]]] = defaultdict(dict)
    for r in results:
        if r.protocol == "pruning":
            c = r.config
            key = (c["model_name_or_path"], c["task"], c["method"], c["checkpoint"] == "early")
            groups[*key, c["learning_rate"], c["max_steps"]][c["seed"]] = (r,)
    ordered = sorted(groups, key=lambda key: (key[0], key[1], key[3], _rank(key[2]), key))
    return [Series(*key[:4], dict(sorted(groups[key].items()))) for key in ordered]


def averaged(series: Sequence[Series]) -> list[Series]:
    """Each model's methods averaged over the tasks, seed by seed; only what every task of the model has."""
    found = []
    for model in dict.fromkeys(s.model for s in series):
        tasks = {s.task for s in series if s.model == model}
        for method, early in dict.fromkeys((s.method, s.early) for s in series if s.model == model):
            parts = [s for s in series if (s.model, s.method, s.early) == (model, method, early)]
            seeds = set.intersection(*(set(s.records) for s in parts))
            if len(tasks) > 1 and {s.task for s in parts} == tasks and len(parts) == len(tasks) and seeds:
                records = {seed: tuple(s.records[seed][0] for s in parts) for seed in sorted(seeds)}
                found.append(Series(model, f"mean of {len(tasks)}", method, early, records))
    return found


def minus(first: dict[int, float], second: dict[int, float]) -> dict[int, float]:
    """The difference of what both have, seed by seed."""
    return {seed: first[seed] - second[seed] for seed in first.keys() & second.keys()}


def pruning_table(results: Iterable[Result]) -> str:
    """Markdown, a row a method: accuracies of the structured variants and of some densities, drops, and against LoRA.

    Accuracies in percent, differences in percentage points. "Drop" is the mean over the four kinds of layers kept.
    """
    series = pruning_series(results)
    if not series:
        return ""
    series += averaged(series)
    head = ["model", "task", "method", "whole", "every other", "low", "middle", "high third", "drop, mean of the four",
            "drop minus LoRA's", *(f"largest {100 * d:g} %" for d in DENSITIES), "nf4"]  # fmt: skip
    rows = []
    for s in series:
        drop = s.over_layers(s.drop)
        against = _like(series, s, method="lora")
        rows.append(
            [
                s.model,
                s.task,
                s.name,
                _mean(s.accuracy("all")),
                *(_mean(s.accuracy(name)) for name in LAYERS),
                _estimate(drop),
                _estimate(minus(drop, against.over_layers(against.drop))) if against is not None else "–",
                *(_mean(s.accuracy("magnitude", density)) for density in DENSITIES),
                _mean(s.accuracy("nf4")),
            ]
        )
    return _markdown(head, rows)


def pruning_details(results: Iterable[Result], densities: Sequence[float] = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1)) -> str:
    """Markdown, a row a variant: every method's accuracy and drop with their intervals, and CopRA's minus LoRA's.

    Args:
        results: records; others than pruning's are left out.
        densities: of the unstructured curves that get a row.
    """
    series = pruning_series(results)
    series += averaged(series)
    tables = []
    for model, task in dict.fromkeys((s.model, s.task) for s in series):
        columns = [s for s in series if (s.model, s.task) == (model, task)]
        first, second = (
            next((s for s in columns if (s.method, s.early) == (m, False)), None) for m in ("copra", "lora")
        )
        names = [s.name for s in columns]
        head = ["kept", *names, *(f"drop, {name}" for name in names)]
        if first and second:
            head += ["CopRA minus LoRA", "CopRA's drop minus LoRA's"]
        rows = []
        for kind, name, density in columns[0].variants():
            if kind == "unstructured" and density not in densities:
                continue
            row = [f"{name}, {density:g}" if density < 1 else name]
            row += [_estimate(s.accuracy(name, density)) for s in columns]
            row += [_estimate(s.drop(name, density)) for s in columns]
            if first and second:
                row.append(_estimate(minus(first.accuracy(name, density), second.accuracy(name, density))))
                row.append(_estimate(minus(first.drop(name, density), second.drop(name, density))))
            rows.append(row)
        tables.append(f"### {task}, {model}\n\n{_markdown(head, rows)}")
    return "\n".join(tables)


def plot_pruning(results: Iterable[Result], stem: Path) -> list[Path]:
    """Bars of what is kept, and accuracy over density, a column a task; means and ranges over seeds, as PNG and SVG.

    Raises:
        InputError: if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    series = pruning_series(results)
    places = list(dict.fromkeys((s.model, s.task) for s in series))
    figure = Figure(figsize=(3.6 * len(places) + 0.6, 8.4), layout="constrained")
    axes = figure.subplots(3, len(places), squeeze=False, sharey="col")
    for column, (model, task) in enumerate(places):
        shown = [s for s in series if (s.model, s.task) == (model, task)]
        _bars(axes[0, column], shown)
        axes[0, column].set_title(f"{task}, {Path(model).name}", fontsize=10)
        for row, by in ((1, "magnitude"), (2, "random")):
            _curves(axes[row, column], shown, by)
            axes[row, column].set_xlabel(f"density, {'largest' if by == 'magnitude' else by} entries kept")
    for row in range(3):
        axes[row, 0].set_ylabel("test accuracy [%]")
    handles = {}
    for axis in axes[0]:
        found, labels = axis.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(handles), frameon=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, stem)


def _bars(axis, series: Sequence[Series]) -> None:
    names = [name for kind, name, _ in series[0].variants() if kind == "structured"]
    width = 0.8 / len(series)
    for i, s in enumerate(series):
        for k, name in enumerate(names):
            values = list(s.accuracy(name).values())
            if not values:
                continue
            mean = sum(values) / len(values)
            style = {"color": COLOURS.get(s.method), "alpha": 0.45 if s.early else 1.0}
            error = [[mean - min(values)], [max(values) - mean]]
            axis.bar(k - 0.4 + (i + 0.5) * width, mean, width, yerr=error, label=s.name if k == 0 else None,
                     error_kw={"elinewidth": 0.8}, **style)  # fmt: skip
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)


def _curves(axis, series: Sequence[Series], by: str) -> None:
    densities = sorted({density for _, name, density in series[0].variants() if name == by})
    for s in series:
        points = [list(s.accuracy(by, density).values()) for density in densities]
        if not all(points):
            continue
        style = {"color": COLOURS.get(s.method), "ls": "--" if s.early else "-"}
        axis.plot(densities, [sum(p) / len(p) for p in points], marker="o", markersize=3, **style)
        axis.fill_between(densities, list(map(min, points)), list(map(max, points)), alpha=0.15, lw=0,
                          color=style["color"])  # fmt: skip


def _like(series: Sequence[Series], one: Series, method: str) -> Series | None:
    """The other method's series of the same model, task and checkpoint; None if there is none, or it is this one."""
    wanted = (one.model, one.task, method, one.early)
    found = next((s for s in series if (s.model, s.task, s.method, s.early) == wanted), None)
    return None if found is one else found


def _rank(method: str) -> int:
    return ORDER.index(method) if method in ORDER else len(ORDER)


def _mean(values: dict[int, float]) -> str:
    return f"{sum(values.values()) / len(values):.1f}" if values else "–"


def _estimate(values: dict[int, float]) -> str:
    estimate: Estimate | None = seed_estimate(list(values.values())) if values else None
    return "–" if estimate is None else str(estimate)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return (
        "\n".join(
            "|" + "|".join(line) + "|" if i == 1 else "| " + " | ".join(line) + " |" for i, line in enumerate(lines)
        )
        + "\n"
    )
