"""The curves between adapters as PNG and SVG files, for a README or a paper; the page draws its own."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from copra_llm.errors import InputError
from copra_llm.figures.groups import by_place
from copra_llm.figures.merged import merged_groups
from copra_llm.figures.pairs import curve_estimates
from copra_llm.results import Result

COLOURS = {"LoRA": "#c2452d", "CopRA": "#1f6f8b", "CoTo": "#7a9e3b"}
"""Of a method's lines; distinguishable without colour vision by their lightness."""


def require_matplotlib() -> None:
    """Say early that plots cannot be made.

    Raises:
        InputError: if matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("plots need matplotlib: pip install copra_llm[report]")


def plot_curves(records: Sequence[Result], stem: Path) -> list[Path]:
    """Accuracy and loss along the line, one line a label (mean over its pairs, 95 % band), as PNG and SVG.

    Raises:
        InputError: if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    places = by_place(merged_groups(records))
    figure = Figure(figsize=(3.4 * len(places) + 0.6, 5.6), layout="constrained")
    axes = figure.subplots(2, len(places), squeeze=False, sharex=True)
    for column, (place, here) in enumerate(places):
        for g in here:
            for axis, quantity in zip(axes[:, column], ("accuracy", "loss"), strict=True):
                alpha, values = curve_estimates(g.records, quantity)
                mean, low, high = np.array([(e.mean, e.low, e.high) for e in values]).T
                (line,) = axis.plot(alpha, mean, label=g.name, color=COLOURS.get(g.label), marker="o", markersize=3)
                if np.isfinite(low).any():
                    axis.fill_between(alpha, low, high, alpha=0.18, color=line.get_color(), lw=0)
        axes[0, column].set_title(place, fontsize=10)
        axes[1, column].set_xlabel("weight of the first adapter")
    axes[0, 0].set_ylabel("test accuracy [%]")
    axes[1, 0].set_ylabel("test loss [nats]")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, stem)


def save_figure(figure, stem: Path) -> list[Path]:
    """Write a matplotlib figure as `stem.png` and `stem.svg`; the same figure gives the same bytes."""
    from matplotlib import rc_context

    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(".png"), stem.with_suffix(".svg")]
    figure.savefig(paths[0], dpi=130, metadata={"Software": None})
    with rc_context({"svg.hashsalt": "copra_llm"}):  # else its ids are random
        figure.savefig(paths[1], metadata={"Date": None})
    return paths
