"""Pictures of layer-wise barriers, planes through three adapters, and similarities, as PNG and SVG.

The same records give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from copra_llm.figures.groups import NAMES, by_place, grouped, label_of
from copra_llm.figures.layers import layer_barriers, layer_groups, whole_barrier
from copra_llm.figures.similarity import COMPARED, method_of, ordered
from copra_llm.report.curves import COLOURS, require_matplotlib, save_figure
from copra_llm.results import Result

MARKERS = "osD^vP*X"


def plot_layers(records: Sequence[Result], stem: Path) -> list[Path]:
    """The averaging barrier of every layer and of the whole, a column a task, one line a label with its interval.

    Raises:
        InputError: if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    places = by_place(layer_groups(records))
    figure = Figure(figsize=(3.4 * len(places) + 0.6, 5.6), layout="constrained")
    axes = figure.subplots(2, len(places), squeeze=False)
    for column, (place, here) in enumerate(places):
        for row, quantity in enumerate(("accuracy", "loss")):
            axis = axes[row, column]
            axis.axhline(0.0, color="#999", lw=0.8)
            for i, g in enumerate(here):
                band = [*layer_barriers(g, quantity), whole_barrier(g, quantity)]
                at = np.arange(len(band)) + 0.12 * (i - (len(here) - 1) / 2)
                half = np.nan_to_num([e.high - e.mean for e in band])
                axis.errorbar(at, [e.mean for e in band], half, fmt="o", ms=4, capsize=2, lw=1,
                              color=COLOURS.get(g.label), label=g.name)  # fmt: skip
        layers = here[0].records[0].data["layers"]
        for axis in axes[:, column]:
            axis.set_xticks(range(len(layers) + 1), [*map(str, range(len(layers))), "all"])
            axis.axvline(len(layers) - 0.5, color="#ccc", lw=0.8)
        axes[0, column].set_title(place, fontsize=10)
        axes[1, column].set_xlabel("layer interpolated alone")
    axes[0, 0].set_ylabel("accuracy lost at α = 0.5 [points]")
    axes[1, 0].set_ylabel("loss gained at α = 0.5 [nats]")
    _legend(figure, axes[0, 0])
    return save_figure(figure, stem)


def plot_planes(records: Sequence[Result], stem: Path) -> list[Path]:
    """Accuracy and loss on each plane, a column a record; one scale for all of a task.

    Raises:
        InputError: if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    records = [r for g in grouped(records) for r in g.records]
    figure = Figure(figsize=(3.5 * len(records) + 0.8, 6.4), layout="constrained")
    axes = figure.subplots(2, len(records), squeeze=False)
    for row, (quantity, unit) in enumerate((("accuracy", "%"), ("loss", "nats"))):
        for column, r in enumerate(records):
            axis = axes[row, column]
            alike = [o for o in records if o.config["task"] == r.config["task"]]
            levels = _levels([o.data[quantity] for o in alike])
            values = np.array(r.data[quantity], dtype=float)  # a loss that was not finite is None: a hole
            filled = axis.contourf(r.data["x"], r.data["y"], values, levels=levels, extend="both",
                                   cmap="viridis" if quantity == "accuracy" else "viridis_r")  # fmt: skip
            corners = r.data["corners"]
            axis.fill([c["x"] for c in corners], [c["y"] for c in corners], fill=False, color="white", lw=0.8)
            for c in corners:
                axis.plot(c["x"], c["y"], "o", color="white", mec="black", ms=5)
                axis.annotate(
                    f"{c['label']}: {c[quantity]:.{1 if row == 0 else 2}f}", (c["x"], c["y"]), xytext=(4, 4),
                    textcoords="offset points", fontsize=7, color="white", path_effects=_outline(),
                )  # fmt: skip
            axis.plot(r.data["centre"]["x"], r.data["centre"]["y"], "+", color="white", ms=7)
            axis.set_aspect("equal")
            if column == len(records) - 1 or records[column + 1].config["task"] != r.config["task"]:
                figure.colorbar(filled, ax=axis, label=f"{quantity} [{unit}]", shrink=0.8)
            axis.set_title(f"{label_of(r)}, {r.config['task']}", fontsize=10)
    return save_figure(figure, stem)


def plot_similarity(records: Sequence[Result], stem: Path) -> list[Path]:
    """t-SNE (colour: method, marker: learning rate, number: seed) beside the cosine similarities, a row a record.

    Raises:
        InputError: if matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.6 * len(records)), layout="constrained")
    axes = figure.subplots(len(records), 2, squeeze=False)
    for (scatter, heat), r in zip(axes, records, strict=True):
        on = COMPARED[r.config["on"]]
        order = ordered(r)
        points = [r.data["points"][i] for i in order]
        _scatter(scatter, points)
        scatter.set_title(f"{'+'.join(r.config.get('tasks', []))}: t-SNE of {on} (numbers: seeds)", fontsize=10)
        image = heat.imshow(np.array(r.data["cosine"])[np.ix_(order, order)], vmin=-1, vmax=1, cmap="RdBu_r")
        names = [f"{method_of(p)} {p['label']}" if p["method"] else p["label"] for p in points]
        heat.set_xticks([])  # the rows' order
        heat.set_yticks(range(len(names)), names, fontsize=6)
        heat.set_title(f"cosine similarity of {on}", fontsize=10)
        figure.colorbar(image, ax=heat, shrink=0.8)
    return save_figure(figure, stem)


def _scatter(axis, points: Sequence[dict]) -> None:
    rates = sorted({p["learning_rate"] for p in points}, key=lambda rate: (rate is None, rate))
    for method, rate in dict.fromkeys((p["method"], p["learning_rate"]) for p in points):
        own = [p for p in points if (p["method"], p["learning_rate"]) == (method, rate)]
        places = np.array([(p["x"], p["y"]) for p in own], dtype=float)  # None (too few adapters) becomes NaN
        name = NAMES.get(method, str(method))
        axis.plot(*places.T, MARKERS[rates.index(rate) % len(MARKERS)], ls="", color=COLOURS.get(name), ms=7,
                  alpha=0.85, label=name + (f", lr {rate:g}" if rate is not None else ""))  # fmt: skip
        for p, place in zip(own, places, strict=True):
            if p["seed"] is not None and np.isfinite(place).all():
                axis.annotate(str(p["seed"]), place, fontsize=7, xytext=(5, 3), textcoords="offset points")
    axis.set(xticks=[], yticks=[])
    axis.legend(fontsize=7, frameon=False)


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """All pictures of a folder of records: `layers`, `planes`, and `similarity-<task>`."""
    paths = []
    for protocol, plot, name in (("layerwise", plot_layers, "layers"), ("plane", plot_planes, "planes")):
        records = [r for r in results if r.protocol == protocol]
        if records:
            paths += plot(records, folder / name)
    alike: dict[str, list[Result]] = {}
    for r in sorted((r for r in results if r.protocol == "similarity"), key=lambda r: r.config["on"]):
        alike.setdefault("+".join(r.config["tasks"]), []).append(r)
    for task, records in alike.items():
        paths += plot_similarity(records, folder / f"similarity-{task}")
    return paths


def _legend(figure, axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)


def _levels(values: list) -> np.ndarray:
    """Contour levels over all the values together."""
    # Far outside the triangle values run away; they are drawn in the scale's last colour.
    low, high = np.nanpercentile(np.array(values, dtype=float), [5, 95])
    return np.linspace(low, high if high > low else low + 1e-6, 13)


def _outline() -> list:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=1.5, foreground="black")]
