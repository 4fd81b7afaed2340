"""What do the records of layer-wise lines, planes and similarities say, in Markdown?

One row a model, task and method. Layer-wise figures are means over the pairs of seeds, each in both orders, with
95 % intervals that know that pairs share seeds (`copra_llm.bands`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import numpy as np

from copra_llm.estimates import Estimate
from copra_llm.figures.groups import Group, grouped
from copra_llm.figures.layers import layer_barriers, layer_groups, whole_barrier
from copra_llm.figures.similarity import COMPARED, between_seeds
from copra_llm.report.tables import markdown_table
from copra_llm.results import Result


def layerwise_table(results: Iterable[Result]) -> str:
    """Markdown: the averaging barrier of the whole, and of single layers: their mean, the worst, their sum."""
    rows = []
    for g in (g for g in layer_groups(results) if layer_barriers(g, "loss")):
        cells = [*_barriers(g, "accuracy", ".1f"), *_barriers(g, "loss", ".3f")]
        parts, whole = sum(e.mean for e in layer_barriers(g, "loss")), whole_barrier(g, "loss").mean
        rows.append((g.model, g.task, g.name, *cells, parts / whole if whole > 0 else None))
    columns = [
        ("model",), ("task",), ("method",), ("whole: acc. lost", ".1f"), ("one layer: acc. lost, mean", ".1f"),
        ("worst layer",), ("whole: loss gained", ".3f"), ("one layer: loss gained, mean", ".3f"), ("worst layer",),
        ("layers' sum / whole", ".2f"),
    ]  # fmt: skip
    return markdown_table(columns, rows)


def _barriers(g: Group, quantity: str, spec: str) -> tuple[Estimate | None, Estimate | None, str]:
    """Of the whole, the mean over single layers, and the worst layer with its name's last two parts: "layer.3"."""
    layers = [e.mean for e in layer_barriers(g, quantity)]
    worst = int(np.argmax(layers))
    name = ".".join(g.records[0].data["layers"][worst].split(".")[-2:])
    both = (whole_barrier(g, quantity, part=part) for part in ("whole", "mean"))
    return *both, f"{layers[worst]:{spec}} ({name})"


def plane_table(results: Iterable[Result]) -> str:
    """Markdown: the three adapters alone (mean), their fusion, and how far apart they are."""
    rows = []
    for g in grouped(r for r in results if r.protocol == "plane"):
        for r in g.records:
            corners, centre = r.data["corners"], r.data["centre"]
            mean = {q: float(np.mean([c[q] for c in corners])) for q in ("accuracy", "loss")}
            apart = np.mean([np.hypot(a["x"] - b["x"], a["y"] - b["y"]) for a, b in combinations(corners, 2)])
            rows.append((g.model, g.task, g.name, mean["accuracy"], centre["accuracy"], mean["loss"], centre["loss"],
                         float(apart)))  # fmt: skip
    columns = [
        ("model",), ("task",), ("method",), ("corners acc.", ".1f"), ("fused acc.", ".1f"), ("corners loss", ".2f"),
        ("fused loss", ".2f"), ("distance of two", ".1f"),
    ]  # fmt: skip
    return markdown_table(columns, rows)


def similarity_table(results: Iterable[Result]) -> str:
    """Markdown: cosine between runs that differ in their seeds alone, by method and settings; distance from T/4."""
    records = [r for r in results if r.protocol == "similarity"]
    rows = [
        (Path(r.config["model_name_or_path"]).name, "+".join(r.config["tasks"]), COMPARED[r.config["on"]], method,
         f"{rate:g}, {steps}", alike, f"{np.mean(early):.2f} ({min(early):.2f} to {max(early):.2f})" if early else None)
        for r in sorted(records, key=lambda r: (r.config["model_name_or_path"], r.config["tasks"], r.config["on"]))
        for method, rate, steps, alike, early in between_seeds(r)
    ]  # fmt: skip
    columns = [("model",), ("task",), ("compared",), ("method",), ("lr, steps",), ("cosine between seeds", ".2f"),
               ("distance from T/4",)]  # fmt: skip
    return markdown_table(columns, rows)
