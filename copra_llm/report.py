"""What do the result records say? Tables, curves and one HTML page, all made from the records alone.

A table has one row a model, task and method: the mean over seeds, with a 95 % interval over seeds
(Student's t) or, for differences between methods, over seed pairs and examples together (bootstrap).
"""

from __future__ import annotations

import base64
import html
import importlib.util
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from copra_llm.errors import InputError
from copra_llm.results import Result, read_result, unpack_bits, write_atomic

ORDER = ("lora", "coto", "copra")
NAMES = {"lora": "LoRA", "copra": "CopRA", "coto": "CoTo"}
COLOURS = {"lora": "#c2452d", "copra": "#1f6f8b", "coto": "#7a9e3b"}
"""Distinguishable without colour vision by their lightness."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self:.1f}"

    def __format__(self, spec: str) -> str:
        if math.isnan(self.low):
            return format(self.mean, spec)
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def find_results(paths: Iterable[Path]) -> list[Result]:
    """Every record among the files and below the folders.

    Raises:
        InputError: if there is none, or a named file is none.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            for file in sorted(path.rglob("*.json")):
                if file.name not in ("adapter_config.json", "state.json"):
                    found.append(read_result(file))
        else:
            found.append(read_result(path))
    if not found:
        raise InputError(f"no result record below {', '.join(map(str, paths))}; give result.json files or folders")
    return found


# --- merged adapters --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """All pairs of one model, task and method at its tuned settings."""

    model: str
    task: str
    method: str
    learning_rate: float
    steps: int
    curves: dict[str, list[Result]]
    """By merge method."""


def connectivity_cells(results: Iterable[Result]) -> list[Cell]:
    """Group interpolation records; the settings with curves are the tuned ones."""
    groups: dict[tuple, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for r in results:
        if r.protocol == "interpolation":
            c = r.config
            key = (c["model_name_or_path"], c["task"], c["method"], c["learning_rate"], c["max_steps"])
            groups[key][c["merge_method"]].append(r)
    rank = {method: i for i, method in enumerate(ORDER)}
    return [
        Cell(*key, curves={m: sorted(groups[key][m], key=_seeds) for m in sorted(groups[key])})
        for key in sorted(groups, key=lambda k: (k[0], k[1], rank.get(k[2], 9)))
    ]


def _seeds(curve: Result) -> list[int]:
    """In this order the curves of two methods are pairs, as far as both have the same seeds."""
    return curve.config.get("seeds", [])


def pair_outcomes(curves: Sequence[Result]) -> tuple[np.ndarray, np.ndarray]:
    """Outcomes of the ends (their mean) and of the middle: two float arrays `(pairs, examples)`."""
    ends, middle = [], []
    for curve in curves:
        rows = np.array([unpack_bits(row) for row in curve.data["correct"]], dtype=float)
        ends.append((rows[0] + rows[-1]) / 2)
        middle.append(rows[int(np.argmin(abs(np.array(curve.data["alpha"]) - 0.5)))])
    return np.array(ends), np.array(middle)


def drop_estimate(curves: Sequence[Result]) -> Estimate:
    """Accuracy of the ends minus the middle, in percentage points; bootstrap over pairs and examples."""
    ends, middle = pair_outcomes(curves)
    return _bootstrap_2d(100.0 * (ends - middle))


def difference_estimate(first: Sequence[Result], second: Sequence[Result]) -> Estimate:
    """Merged accuracy of the first minus the second, on the same examples, in percentage points."""
    a, b = pair_outcomes(first)[1], pair_outcomes(second)[1]
    if a.shape != b.shape:
        return Estimate(100.0 * (a.mean() - b.mean()), math.nan, math.nan)
    return _bootstrap_2d(100.0 * (a - b))


def loss_difference_estimate(first: Sequence[Result], second: Sequence[Result]) -> Estimate:
    """Merged loss of the first minus the second, in nats; Student's t over the pairs of equal seeds, if there are."""
    by_seeds = [
        {tuple(c.config["seeds"]): mean_metric([c], "loss@0.5") for c in curves if "seeds" in c.config}
        for curves in (first, second)
    ]
    shared = sorted(by_seeds[0].keys() & by_seeds[1].keys())
    if not shared:
        return Estimate(mean_metric(first, "loss@0.5") - mean_metric(second, "loss@0.5"), math.nan, math.nan)
    return seed_estimate([by_seeds[0][seeds] - by_seeds[1][seeds] for seeds in shared])


def _bootstrap_2d(values: np.ndarray, draws: int = 2000) -> Estimate:
    """Mean of `values (pairs, examples)`; pairs and examples are both resampled."""
    rng = np.random.default_rng(0)
    pairs, examples = values.shape
    means = [
        values[np.ix_(rng.integers(0, pairs, pairs), rng.integers(0, examples, examples))].mean() for _ in range(draws)
    ]
    return Estimate(float(values.mean()), *map(float, np.percentile(means, [2.5, 97.5])))


def mean_metric(curves: Sequence[Result], name: str) -> float:
    """Mean over pairs of `<split>/<task>/<name>`."""
    return float(np.mean([c.metrics[f"{c.config['split']}/{c.config['task']}/{name}"] for c in curves]))


def connectivity_table(results: Iterable[Result]) -> str:
    """Markdown: single and merged accuracy and loss, the drop, and each method against LoRA."""
    cells = connectivity_cells(results)
    if not cells:
        return ""
    lines = [
        "| model | task | method | lr, steps | single acc. | fused acc. | drop when fused | fused acc. minus LoRA's "
        "| mixture acc. | single / fused / mixture loss | fused loss minus LoRA's |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        fusion, mixture = cell.curves.get("fusion"), cell.curves.get("mixture")
        lora = next((c for c in cells if (c.model, c.task, c.method) == (cell.model, cell.task, "lora")), None)
        both = fusion or mixture
        single = (mean_metric(both, "accuracy@0") + mean_metric(both, "accuracy@1")) / 2
        single_loss = (mean_metric(both, "loss@0") + mean_metric(both, "loss@1")) / 2
        against, loss_against = "–", "–"
        if lora is not None and lora is not cell and fusion and lora.curves.get("fusion"):
            against = str(difference_estimate(fusion, lora.curves["fusion"]))
            loss_against = f"{loss_difference_estimate(fusion, lora.curves['fusion']):.2f}"
        losses = [f"{single_loss:.2f}"] + [f"{mean_metric(c, 'loss@0.5'):.2f}" if c else "–" for c in (fusion, mixture)]
        row = (
            cell.model, cell.task, NAMES.get(cell.method, cell.method), f"{cell.learning_rate:g}, {cell.steps}",
            f"{single:.1f}",
            f"{mean_metric(fusion, 'accuracy@0.5'):.1f}" if fusion else "–",
            str(drop_estimate(fusion)) if fusion else "–",
            against,
            f"{mean_metric(mixture, 'accuracy@0.5'):.1f}" if mixture else "–",
            " / ".join(losses),
            loss_against,
        )  # fmt: skip
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


# --- single runs ------------------------------------------------------------------------------------------


def training_table(results: Iterable[Result]) -> str:
    """Markdown: one row a model, task, method and settings; mean over seeds."""
    groups: dict[tuple, list[Result]] = defaultdict(list)
    for r in results:
        if r.protocol == "train":
            c = r.config
            for task in c["tasks"]:
                key = (c["model_name_or_path"], task, c["method"], c["learning_rate"], r.steps)
                groups[key].append(r)
    if not groups:
        return ""
    lines = ["| model | task | method | lr, steps | seeds | dev acc. | test acc. | test loss | seconds |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (model, task, method, rate, steps), runs in sorted(groups.items()):
        dev, test = (seed_estimate([r.metrics[f"{s}/{task}/accuracy"] for r in runs]) for s in ("dev", "test"))
        loss = np.mean([r.metrics[f"test/{task}/loss"] for r in runs])
        seconds = np.median([r.seconds for r in runs])
        row = (model, task, NAMES.get(method, method), f"{rate:g}, {steps}", str(len(runs)), str(dev), str(test),
               f"{loss:.2f}", f"{seconds:.0f}")  # fmt: skip
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def t_975(df: int) -> float:
    """97.5 % quantile of Student's t with `df` degrees of freedom; beyond the table by its expansion around z."""
    z = 1.959964
    return T_975.get(df) or z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)


def seed_estimate(values: Sequence[float]) -> Estimate:
    """Mean over seeds with a 95 % interval; no interval for one seed."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Estimate(mean, math.nan, math.nan)
    half = t_975(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half)


def step_time_table(results: Iterable[Result]) -> str:
    """Markdown: time of a step of each loop relative to plain PEFT in a bare loop."""
    rows = []
    for r in (r for r in results if r.protocol == "step_time"):
        cells = [r.config["model_name_or_path"], f"{1000 * r.metrics['seconds_per_step/bare PEFT']:.0f} ms"]
        for name in ("LoRA", "CopRA"):
            ratio, low, high = (r.metrics[f"{key}/{name}"] for key in ("ratio", "ratio_min", "ratio_max"))
            cells.append(f"{ratio:.2f} [{low:.2f}, {high:.2f}]")
        rows.append("| " + " | ".join(cells) + " |")
    if not rows:
        return ""
    head = "| model | plain PEFT, bare loop | this loop, LoRA | this loop, CopRA |\n|---|---|---|---|\n"
    return head + "\n".join(rows) + "\n"


# --- plots and pages --------------------------------------------------------------------------------------


def require_matplotlib() -> None:
    """Say early that plots cannot be made.

    Raises:
        InputError: if matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib: pip install copra_llm[report]")


def plot_curves(records: Sequence[Result], stem: Path) -> list[Path]:
    """Accuracy and loss along the line, one line a label (mean and range over its pairs), as PNG and SVG.

    Raises:
        InputError: if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    where = list(dict.fromkeys((r.config["model_name_or_path"], r.config["task"]) for r in records))
    figure = Figure(figsize=(3.4 * len(where) + 0.6, 5.6), layout="constrained")
    axes = figure.subplots(2, len(where), squeeze=False, sharex=True)
    for column, (model, task) in enumerate(where):
        groups = defaultdict(list)
        for r in records:
            if (r.config["model_name_or_path"], r.config["task"]) == (model, task):
                groups[r.config["label"]].append(r)
        for label in sorted(groups, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name)):
            for row, quantity in enumerate(("accuracy", "loss")):
                axis = axes[row, column]
                grid = np.array(groups[label][0].data["alpha"])
                points = [r.data[quantity] for r in groups[label] if len(r.data["alpha"]) == len(grid)]
                values = np.array(points, dtype=float)  # a loss that was not finite is None: a gap
                (line,) = axis.plot(grid, values.mean(0), label=NAMES.get(label, label), color=COLOURS.get(label),
                                    marker="o", markersize=3)  # fmt: skip
                if len(values) > 1:
                    axis.fill_between(grid, values.min(0), values.max(0), alpha=0.18, color=line.get_color(), lw=0)
        axes[0, column].set_title(f"{task}, {Path(model).name}", fontsize=10)
        axes[1, column].set_xlabel("weight of the first adapter")
    axes[0, 0].set_ylabel("test accuracy [%]")
    axes[1, 0].set_ylabel("test loss [nats]")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    figure.savefig(paths[0], dpi=130, metadata={"Software": None})
    # A salt and no date: the same records give the same bytes.
    with rc_context({"svg.hashsalt": "copra_llm"}):
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }}
table {{ border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums }}
div.table {{ overflow-x: auto }}
th, td {{ padding: 0.3rem 0.7rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap }}
img {{ max-width: 100%; height: auto }}
footer {{ color: #666; font-size: 0.85rem; margin-top: 2rem }}
</style></head><body>
<h1>{title}</h1>
{body}
<footer>{footer}</footer>
</body></html>
"""


_MERGED_NOTE = (
    "Means over all pairs of seeds, on test. Accuracies in percent, losses in nats. Drop: mean of the two ends minus "
    "the middle. Intervals 95 %: for accuracies a bootstrap over pairs and examples, for losses Student's t over "
    "pairs. Pairs share seeds, so with few seeds both are somewhat too narrow."
)


def write_report(paths: Sequence[Path], output: Path, title: str = "LoRA, CoTo and CopRA, single and merged") -> Path:
    """Write `report.html` (self-contained), `table.md`, and the plots; returns the page's path."""
    results = find_results(paths)
    merged, single = connectivity_table(results), training_table(results)
    parts, markdown = [], []
    curves = [r for r in results if r.protocol == "interpolation" and r.config["merge_method"] == "fusion"]
    if curves:
        png, _ = plot_curves(curves, output / "curves")
        picture = base64.b64encode(png.read_bytes()).decode()
        parts.append("<h2>Along the line between two adapters (fusion)</h2><p>Mean over the pairs of seeds; the band "
                     "is their range.</p>"
                     f'<img alt="the curves" src="data:image/png;base64,{picture}">')  # fmt: skip
    steps = step_time_table(results)
    for heading, table, note in (
        ("Merged", merged, _MERGED_NOTE),
        ("Single runs", single, "Accuracies in percent, losses in nats; intervals 95 % over seeds (Student's t)."),
        ("Time of a step", steps, "Ratios of medians over interleaved rounds; in brackets the rounds' range."),
    ):
        if table:
            parts.append(f"<h2>{heading}</h2><p>{html.escape(note)}</p>")
            parts.append(f'<div class="table">{_html_table(table)}</div>')
            markdown.append(table)
    versions = next((r.environment.get("versions") for r in results if r.environment.get("versions")), {})
    footer = f"From {len(results)} result records; " + ", ".join(f"{k} {v}" for k, v in versions.items() if v)
    write_atomic(output / "table.md", "\n".join(markdown))
    page = output / "report.html"
    write_atomic(page, _PAGE.format(title=html.escape(title), body="\n".join(parts), footer=html.escape(footer)))
    return page


def _html_table(markdown: str) -> str:
    lines = [line.strip("|\n ").split("|") for line in markdown.splitlines()]
    rows = [[html.escape(cell.strip()) for cell in cells] for cells in lines]
    head = "".join(f"<th>{cell}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows[2:])
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
