"""What do the records of layer-wise lines, planes and similarities say, in Markdown?

One row a model, task and method. Layer-wise figures are means over the pairs of seeds, each in both orders, with
95 % intervals that know that pairs share seeds (`copra_llm.bands`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from copra_llm.bands import Band, pair_band
from copra_llm.report import NAMES, ORDER
from copra_llm.results import Result


def grouped(records: Iterable[Result]) -> dict[tuple[str, str, str], list[Result]]:
    """Records by (model, task, label), methods in the usual order."""
    groups: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    for r in records:
        groups[Path(r.config["model_name_or_path"]).name, r.config["task"], r.config["label"]].append(r)
    rank = {method: i for i, method in enumerate(ORDER)}
    return {key: groups[key] for key in sorted(groups, key=lambda k: (k[0], k[1], rank.get(k[2], 9), k[2]))}


def barrier_band(records: Sequence[Result], name: str) -> Band:
    """A layer-wise metric over pairs of seeds: `name` is what follows `<split>/<task>/`."""
    values = np.array([r.metrics[f"{r.config['split']}/{r.config['task']}/{name}"] for r in records])
    known = all("seeds" in r.config for r in records)
    return pair_band(values, [tuple(r.config["seeds"]) for r in records] if known else None)


def layer_band(records: Sequence[Result], kind: str) -> Band:
    """A layer-wise metric of all layers and the whole `(layers + 1,)`; `kind`: "loss_averaging_barrier", ..."""
    names = [f"{kind}/{layer}" for layer in records[0].data["layers"]] + [f"{kind}_whole"]
    bands = [barrier_band(records, name) for name in names]
    return Band(*(np.array([getattr(band, part) for band in bands]) for part in ("mean", "low", "high")))


def layerwise_table(results: Iterable[Result]) -> str:
    """Markdown: the averaging barrier of the whole, and of single layers: their mean, the worst, their sum."""
    lines = [
        "| model | task | method | whole: acc. lost | one layer: acc. lost, mean | worst layer | whole: loss gained "
        "| one layer: loss gained, mean | worst layer | layers' sum / whole |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, task, label), records in grouped(r for r in results if r.protocol == "layerwise").items():
        row = [model, task, NAMES.get(label, label)]
        for quantity, spec in (("accuracy", ".1f"), ("loss", ".3f")):
            kind = f"{quantity}_averaging_barrier"
            layers = layer_band(records, kind).mean[:-1]
            row += [_cell(barrier_band(records, f"{kind}_{part}"), spec) for part in ("whole", "mean")]
            worst = int(np.argmax(layers))
            row.append(f"{layers[worst]:{spec}} ({_short(records[0].data['layers'][worst])})")
        whole = float(barrier_band(records, "loss_averaging_barrier_whole").mean)
        row.append(f"{layers.sum() / whole:.2f}" if whole > 0 else "–")
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def plane_table(results: Iterable[Result]) -> str:
    """Markdown: the three adapters alone (mean), their fusion, and how far apart they are."""
    lines = ["| model | task | method | corners acc. | fused acc. | corners loss | fused loss | distance of two |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for (model, task, label), records in grouped(r for r in results if r.protocol == "plane").items():
        for r in records:
            mean = {q: np.mean([c[q] for c in r.data["corners"]]) for q in ("accuracy", "loss")}
            places = np.array([(c["x"], c["y"]) for c in r.data["corners"]])
            apart = np.mean([np.linalg.norm(places[i] - places[j]) for i, j in ((0, 1), (0, 2), (1, 2))])
            centre = r.data["centre"]
            row = (model, task, NAMES.get(label, label), f"{mean['accuracy']:.1f}", f"{centre['accuracy']:.1f}",
                   f"{mean['loss']:.2f}", f"{centre['loss']:.2f}", f"{apart:.1f}")  # fmt: skip
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def similarity_table(results: Iterable[Result]) -> str:
    """Markdown: cosine between runs that differ in their seeds alone, by method and settings; distance from T/4."""
    lines = ["| model | task | compared | method | lr, steps | cosine between seeds | distance from T/4 |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    records = [r for r in results if r.protocol == "similarity"]
    for r in sorted(records, key=lambda r: (r.config["model_name_or_path"], r.config["tasks"], r.config["on"])):
        points, cosine = r.data["points"], np.array(r.data["cosine"])
        groups: dict[tuple, list[int]] = defaultdict(list)
        for i, p in enumerate(points):
            groups[p["method"], p["learning_rate"], p["steps"]].append(i)
        rank = {method: i for i, method in enumerate(ORDER)}
        for key in sorted(groups, key=lambda k: (rank.get(k[0], 9), *k[1:])):
            own = groups[key]
            pairs = [(i, j) for i in own for j in own if i < j]
            if not pairs:
                continue
            seeds = [(points[i]["seed"], points[j]["seed"]) for i, j in pairs]
            early = [e["distance"] for e in r.data["early_distance"] if _key(e) == key]
            row = (Path(r.config["model_name_or_path"]).name, "+".join(r.config["tasks"]),
                   {"delta": "ΔW", "factors": "A and B"}[r.config["on"]], NAMES.get(key[0], str(key[0])),
                   f"{key[1]:g}, {key[2]}", _cell(pair_band(np.array([cosine[p] for p in pairs]), seeds), ".2f"),
                   f"{np.mean(early):.2f} ({min(early):.2f} to {max(early):.2f})" if early else "–")  # fmt: skip
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def _key(entry: dict) -> tuple:
    return entry["method"], entry["learning_rate"], entry["steps"]


def _cell(band: Band, spec: str) -> str:
    mean, low, high = (float(part) for part in (band.mean, band.low, band.high))
    return f"{mean:{spec}}" if np.isnan(low) else f"{mean:{spec}} [{low:{spec}}, {high:{spec}}]"


def _short(layer: str) -> str:
    """A layer's name by its last two parts: "layer.3"."""
    return ".".join(layer.split(".")[-2:])
