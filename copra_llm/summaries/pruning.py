"""What do the pruning records say? Tables and a plot, made from the records alone.

Means over seeds with 95 % intervals (Student's t). What is compared is compared seed by seed, since runs of one seed
share initialisation and data order: a variant with the whole adapter, and a method with LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from copra_llm.estimates import Estimate, paired_estimate, seed_estimate
from copra_llm.figures.pruning import LAYERS, Series, averaged, outcomes, pruning_series
from copra_llm.report.curves import COLOURS, require_matplotlib, save_figure
from copra_llm.report.tables import markdown, markdown_table, table
from copra_llm.results import Result

DENSITIES = (0.5, 0.3, 0.1)
"""Of the entries with the largest magnitude, shown in the short table."""


def structured_table(results: Iterable[Result]) -> str:
    """Markdown, a row a method's finished adapters: accuracies with some of the layers, drops, and against LoRA.

    Accuracies in percent, differences in percentage points. "Drop" is the mean over the four kinds of layers kept.
    """
    return _table((r for r in results if r.config.get("checkpoint") != "early"), ())


def pruning_table(results: Iterable[Result]) -> str:
    """The same with some densities and 4 bits, and of the checkpoints at a quarter of the run."""
    return _table(results, DENSITIES)


def pruning_loss_table(results: Iterable[Result]) -> str:
    """The same in loss, in nats: for answers that are seldom right as a whole."""
    return _table(results, DENSITIES, "loss")


def _table(results: Iterable[Result], densities: Sequence[float], what: str = "accuracy") -> str:
    series = pruning_series(results)
    series += averaged(series)
    rows = []
    for s in series:
        against = next((o for o in series if o.place == s.place and (o.method, o.early) == ("LoRA", s.early)), s)
        lost, lora_lost = (of.over_layers(partial(of.worse, what)) for of in (s, against))
        rows.append((
            s.model, s.task, s.name, *(_mean(s.value(what, name)) for name in ("all", *LAYERS)), _estimate(lost),
            paired_estimate(lost, lora_lost) if against is not s else None,
            *(_mean(s.value(what, "magnitude", density)) for density in densities),
            *(_mean(s.value(what, "nf4")) for _ in densities[:1]),
        ))  # fmt: skip
    spec, worse = (".1f", "drop") if what == "accuracy" else (".3f", "rise")
    columns = [
        ("model",), ("task",), ("method",), ("whole", spec), ("every other", spec), ("low", spec),
        ("middle", spec), ("high third", spec), (f"{worse}, mean of the four", spec), (f"{worse} minus LoRA's", spec),
        *((f"largest {100 * d:g} %", spec) for d in densities), *(("nf4", spec) for _ in densities[:1]),
    ]  # fmt: skip
    # What no plan has asked for has no column.
    return markdown(table("", columns, rows, heads=10)) if rows else ""


def pruning_details(results: Iterable[Result], densities: Sequence[float] = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1)) -> str:
    """Markdown, a row a variant: every method's accuracy and drop with their intervals, and CopRA's minus LoRA's.

    Args:
        results: records; others than pruning's are left out.
        densities: of the unstructured curves that get a row.
    """
    series = pruning_series(results)
    series += averaged(series)
    tables = []
    for model, task in dict.fromkeys(s.place for s in series):
        shown = [s for s in series if s.place == (model, task)]
        whole = {s.method: s for s in shown if not s.early}
        both = [whole["CopRA"], whole["LoRA"]] if {"CopRA", "LoRA"} <= whole.keys() else []
        rows = []
        for kind, name, density in outcomes(shown[0].groups[0]):
            if kind == "unstructured" and density not in densities:
                continue
            row = [f"{name}, {density:g}" if density < 1 else name]
            for value in (Series.accuracy, Series.drop):
                row += [_estimate(value(s, name, density)) for s in shown]
            if both:
                row += [paired_estimate(*(value(s, name, density) for s in both))
                        for value in (Series.accuracy, Series.drop)]  # fmt: skip
            rows.append(row)
        names = ["kept", *(s.name for s in shown), *(f"drop, {s.name}" for s in shown)]
        names += ["CopRA minus LoRA", "CopRA's drop minus LoRA's"] if both else []
        tables.append(f"### {task}, {model}\n\n{markdown_table([(name, '.1f') for name in names], rows)}")
    return "\n".join(tables)


def plot_pruning(results: Iterable[Result], stem: Path) -> list[Path]:
    """Bars of what is kept, and accuracy over density, a column a task; means and ranges over seeds, as PNG and SVG.

    Raises:
        InputError: if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    series = pruning_series(results)
    places = list(dict.fromkeys(s.place for s in series))
    figure = Figure(figsize=(3.6 * len(places) + 0.6, 8.4), layout="constrained")
    axes = figure.subplots(3, len(places), squeeze=False, sharey="col")
    for column, (model, task) in enumerate(places):
        shown = [s for s in series if s.place == (model, task)]
        _bars(axes[0, column], shown)
        axes[0, column].set_title(f"{task}, {model}", fontsize=10)
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
    names = [name for kind, name, _ in outcomes(series[0].groups[0]) if kind == "structured"]
    width = 0.8 / len(series)
    for i, s in enumerate(series):
        for k, name in enumerate(names):
            values = list(s.accuracy(name).values())
            if not values:
                continue
            mean = sum(values) / len(values)
            style = {"color": COLOURS.get(s.method), "alpha": 0.45 if s.early else 1.0}
            # Of equal values the mean may lie beside them by a rounding.
            error = [[max(0.0, mean - min(values))], [max(0.0, max(values) - mean)]]
            axis.bar(k - 0.4 + (i + 0.5) * width, mean, width, yerr=error, label=s.name if k == 0 else None,
                     error_kw={"elinewidth": 0.8}, **style)  # fmt: skip
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)


def _curves(axis, series: Sequence[Series], by: str) -> None:
    densities = sorted({density for _, name, density in outcomes(series[0].groups[0]) if name == by})
    for s in series:
        points = [list(s.accuracy(by, density).values()) for density in densities]
        if not all(points):
            continue
        style = {"color": COLOURS.get(s.method), "ls": "--" if s.early else "-"}
        axis.plot(densities, [sum(p) / len(p) for p in points], marker="o", markersize=3, **style)
        axis.fill_between(densities, list(map(min, points)), list(map(max, points)), alpha=0.15, lw=0,
                          color=style["color"])  # fmt: skip


def _mean(values: Mapping[int, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None


def _estimate(values: Mapping[int, float]) -> Estimate | None:
    return seed_estimate(list(values.values())) if values else None
