"""Result records of every protocol, made from closed forms: what the report is tested with."""

from __future__ import annotations

import itertools
import math

import numpy as np

from copra_llm.results import Result, pack_bits

ENVIRONMENT = {"versions": {"torch": "2.13.0", "copra_llm": None}, "base_fingerprint": "53aa51172d142c89"}
METHODS = ("lora", "coto", "copra")
SEEDS = (0, 1, 2)
EXAMPLES = 50
LAYERS = 6
FLAT = {"model_name_or_path": "minilm", "lora_r": 4, "learning_rate": 0.004, "max_steps": 300}


def record(protocol: str, data: dict, metrics: dict | None = None, seconds: float = 30.0, **config) -> Result:
    """A record with a run's settings; the date is fixed, so that pages are the same byte for byte."""
    created = "2026-01-02T03:04:05+00:00"
    return Result(protocol, FLAT | config, metrics or {}, seconds, data=data, environment=ENVIRONMENT, created=created)


def outcomes(accuracy: float, seed: int = 0) -> str:
    """`EXAMPLES` outcomes of which as many are right as an accuracy in percent says."""
    right = np.zeros(EXAMPLES, dtype=bool)
    right[: round(accuracy / 100 * EXAMPLES)] = True
    return pack_bits(np.random.default_rng(seed).permutation(right))


def quality(method: str, seed: int = 0, task: str = "sst2") -> float:
    """Accuracy of a single adapter, in percent."""
    return {"lora": 88.0, "coto": 87.0, "copra": 86.0}[method] + 2.0 * (seed - 1) - (6.0 if task == "mnli" else 0.0)


def dip(method: str) -> float:
    """Percentage points lost in the middle of a line."""
    return {"lora": 20.0, "coto": 8.0, "copra": 4.0}[method]


def runs(methods=METHODS, tasks=("sst2", "mnli"), rates=(0.004,), steps=(300,), **config) -> list[Result]:
    made = []
    for task, method, rate, n, seed in itertools.product(tasks, methods, rates, steps, SEEDS):
        accuracy = quality(method, seed, task) - 400 * abs(rate - 0.004) - (300 - n) / 50
        metrics = {}
        for split, value in (("dev", accuracy + 1), ("test", accuracy)):
            metrics |= {f"{split}/{task}/accuracy": value, f"{split}/{task}/loss": 2 - value / 60}
        data = {"log": [], "dev": [], "skipped_steps": 0, f"correct/test/{task}": outcomes(accuracy, seed)}
        settings = {"tasks": [task], "method": method, "seed": seed, "learning_rate": rate, "max_steps": n}
        made.append(record("train", data, metrics, 60.0 + seed, **settings | config))
    return made


def lines(methods=METHODS, tasks=("sst2", "mnli"), merge_method="fusion", points=11, **config) -> list[Result]:
    """All pairs of seeds; a parabola below the chord between the ends."""
    made = []
    alpha = np.linspace(0, 1, points)
    for task, method, (i, j) in itertools.product(tasks, methods, itertools.combinations(SEEDS, 2)):
        ends = quality(method, i, task), quality(method, j, task)
        depth = dip(method) if merge_method == "fusion" else 0.5
        accuracy = alpha * ends[0] + (1 - alpha) * ends[1] - 4 * depth * alpha * (1 - alpha)
        correct = [outcomes(a, i + 3 * j) for a in accuracy]
        accuracy = [100 * row.count("1") / EXAMPLES for row in correct]
        loss = [2 - a / 60 for a in accuracy]
        metrics = {f"test/{task}/accuracy@{k}": accuracy[n] for k, n in (("0", 0), ("0.5", points // 2), ("1", -1))}
        metrics |= {f"test/{task}/loss@{k}": loss[n] for k, n in (("0", 0), ("0.5", points // 2), ("1", -1))}
        settings = {"label": method, "method": method, "merge_method": merge_method, "merge_options": {},
                    "split": "test", "task": task, "points": points, "seeds": [i, j]}  # fmt: skip
        data = {"alpha": alpha.tolist(), "accuracy": accuracy, "loss": loss, "correct": correct}
        made.append(record("interpolation", data, metrics, **settings | config))
    return made


def layerwise(methods=METHODS) -> list[Result]:
    made = []
    alpha = np.linspace(0, 1, 5)
    layers = [f"encoder.layer.{i}" for i in range(LAYERS)]
    for method, (i, j) in itertools.product(methods, itertools.permutations(SEEDS, 2)):
        depth = dip(method) / 4 * (1 + np.arange(LAYERS) / LAYERS) + 0.2 * (i + j - 2)
        accuracy = [(85 - 4 * d * alpha * (1 - alpha)).tolist() for d in depth]
        loss = [[2 - a / 60 for a in row] for row in accuracy]
        metrics = {}
        for quantity, rows in (("accuracy", accuracy), ("loss", loss)):
            sign = 1 if quantity == "accuracy" else -1
            lost = [sign * ((row[0] + row[-1]) / 2 - row[2]) for row in rows]
            for kind in ("barrier", "averaging_barrier"):
                metrics |= {f"test/sst2/{quantity}_{kind}/{n}": v for n, v in zip(layers, lost, strict=True)}
                metrics |= {f"test/sst2/{quantity}_{kind}_mean": float(np.mean(lost)),
                            f"test/sst2/{quantity}_{kind}_whole": 3 * max(lost)}  # fmt: skip
        settings = {"method": method, "label": method, "seeds": [i, j], "split": "test", "task": "sst2",
                    "merge_method": "fusion"}  # fmt: skip
        data = {"layers": layers, "alpha": alpha.tolist(), "accuracy": accuracy, "loss": loss}
        made.append(record("layerwise", data, metrics, **settings))
    return made


def planes(methods=METHODS, points=11) -> list[Result]:
    made = []
    grid = np.linspace(-0.5, 1.5, points)
    corners = [("seed 0", 0.0, 0.0), ("seed 1", 1.0, 0.0), ("seed 2", 0.5, 0.9)]
    for method in methods:
        x, y = np.meshgrid(grid, grid)
        away = np.min([(x - a) ** 2 + (y - b) ** 2 for _, a, b in corners], 0)
        accuracy = 88 - 2 * dip(method) * away
        data = {
            "x": grid.tolist(), "y": grid.tolist(), "accuracy": accuracy.tolist(),
            "loss": (2 - accuracy / 60).tolist(),
            "corners": [{"label": name, "x": a, "y": b} for name, a, b in corners],
        }  # fmt: skip
        settings = {"method": method, "label": method, "split": "test", "task": "sst2", "seeds": list(SEEDS)}
        made.append(record("plane", data, **settings))
    return made


def prunings(methods=METHODS) -> list[Result]:
    """Also the early checkpoint of CopRA."""
    made = []
    cases = [("structured", name, d) for name, d in (("all", 1.0), ("every-other", 0.5), ("low", 1 / 3),
             ("middle", 1 / 3), ("high", 1 / 3), ("attention.self.query", 0.33))]  # fmt: skip
    cases += [("unstructured", by, d) for by in ("magnitude", "random") for d in (0.1, 0.25, 0.5, 0.75, 1.0)]
    cases += [("quantised", name, 1.0) for name in ("int8", "nf4")]
    for method, seed, checkpoint in itertools.product(methods, SEEDS, ("final", "early")):
        if checkpoint == "early" and method != "copra":
            continue
        rows = []
        for kind, name, density in cases:
            lost = (1 - density) * 3 * dip(method) * (1.5 if name == "random" else 1) + (
                10 if checkpoint != "final" else 0
            )
            accuracy = quality(method, seed) - (0.5 if kind == "quantised" else lost)
            size = round(36864 * density)
            rows.append({"kind": kind, "name": name, "density": density, "accuracy": accuracy,
                         "loss": 2 - accuracy / 60, "correct": outcomes(accuracy, seed), "parameters": size,
                         "bytes": 4 * size})  # fmt: skip
        metrics = {f"test/sst2/accuracy/{r['name']}@{r['density']:g}": r["accuracy"] for r in rows}
        settings = {"method": method, "seed": seed, "split": "test", "task": "sst2", "checkpoint": checkpoint}
        made.append(record("pruning", {"rows": rows}, metrics, **settings))
    return made


def shapleys(methods=METHODS, players=LAYERS, seeds=SEEDS) -> list[Result]:
    """Values that rise with the layer for LoRA and are level for CopRA; exact for few players."""
    made = []
    slope = {"lora": 1.0, "coto": 0.4, "copra": 0.1}
    for method, seed in itertools.product(methods, seeds):
        raw = 1 + slope[method] * (np.arange(players) - players / 2) / (players / 2) + 0.05 * seed
        values = 0.9 * raw / raw.sum()
        exact = players <= 16
        data = {
            "players": [f"model.layers.{i}" for i in range(players)], "values": values.tolist(),
            "standard_errors": None if exact else [0.01] * players, "v_empty": -1.4, "v_full": -0.5,
            "evaluations": 2**players if exact else 2000, "efficiency_gap": 1e-9,
        }  # fmt: skip
        third = sorted(values)[-(players // 3) :]
        metrics = {"test/sst2/top_third_share": float(sum(third) / 0.9), "test/sst2/gini": 0.1 * slope[method]}
        settings = {"method": method, "seed": seed, "split": "test", "task": "sst2", "metric": "loss",
                    "estimator": "exact" if exact else "regression", "budget": data["evaluations"],
                    "granularity": "layer"}  # fmt: skip
        if players > 16:
            settings["model_name_or_path"] = "smollm2"
        made.append(record("shapley", data, metrics, **settings))
    return made


def federated(methods=METHODS, rounds=3) -> list[Result]:
    made = []
    for method, seed, (kind, beta) in itertools.product(methods, SEEDS, (("iid", None), ("dirichlet", 0.5))):
        entries = []
        for k in range(rounds):
            origin = quality(method, seed) - 6 * (rounds - 1 - k) - (10 if beta else 0)
            clients = [{"seed": 10 * seed + c, "examples": 100, "r": 4, "accuracy": origin + c - 1, "loss": 0.5}
                       for c in range(3)]  # fmt: skip
            merged = origin - dip(method)
            after = {"accuracy": merged, "loss": 0.7, "correct": outcomes(merged, seed)}
            entries.append({"round": k + 1, "clients": clients, "merged": after})
        metrics = {"test/sst2/accuracy/origin": origin, "test/sst2/accuracy/merged": merged,
                   "test/sst2/loss/origin": 0.5, "test/sst2/loss/merged": 0.7}  # fmt: skip
        settings = {"method": method, "seed": seed, "task": "sst2", "clients": 3, "split_kind": kind, "beta": beta,
                    "rounds": rounds, "merge_method": "mixture", "merge_options": {"r": 4}, "case": "even",
                    "each": []}  # fmt: skip
        made.append(record("federated", {"rounds": entries}, metrics, **settings))
    return made


def multitask(methods=METHODS) -> list[Result]:
    made = []
    tasks = ["sst2", "mnli", "agnews"]
    for method, seed, merge_method in itertools.product(methods, SEEDS, ("fusion", "ties")):
        metrics, kept = {}, 1 - dip(method) / 100 - (0.05 if merge_method == "fusion" else 0)
        for task in tasks:
            single = quality(method, seed, task)
            metrics |= {f"test/{task}/accuracy/single": single, f"test/{task}/accuracy/merged": kept * single,
                        f"test/{task}/accuracy/normalised": 100 * kept}  # fmt: skip
        for which in ("single", "merged", "normalised"):
            metrics[f"test/mean/accuracy/{which}"] = float(
                np.mean([metrics[f"test/{t}/accuracy/{which}"] for t in tasks])
            )
        options = {"density": 0.5} if merge_method == "ties" else {}
        settings = {"method": method, "seed": seed, "tasks": tasks, "merge_method": merge_method,
                    "merge_options": options, "weights": [1 / 3] * 3}  # fmt: skip
        made.append(record("multitask", {}, metrics, **settings))
    return made


def over_steps(methods=METHODS) -> list[Result]:
    made = []
    steps = [50, 100, 150, 200, 250, 300]
    for method, pair in itertools.product(methods, itertools.combinations(SEEDS, 2)):
        single = [quality(method, pair[0]) - 30 * math.exp(-s / 80) for s in steps]
        merged = [a - dip(method) * s / 300 for a, s in zip(single, steps, strict=True)]
        settings = {"method": method, "task": "sst2", "seeds": list(pair), "merge_method": "fusion"}
        made.append(record("merge_over_steps", {"steps": steps, "single": single, "merged": merged}, **settings))
    return made


def similarity(rates=(0.001, 0.004)) -> list[Result]:
    """Adapters of one method lie together; cosine 0.6 between seeds, 0.1 between methods."""
    points = [
        {"method": m, "seed": s, "learning_rate": r, "label": f"{m}-{r}-{s}", "x": 10.0 * k + s, "y": 5.0 * i - s}
        for k, m in enumerate(METHODS)
        for i, r in enumerate(rates)
        for s in SEEDS
    ]
    cosine = [
        [1.0 if a is b else 0.6 if a["method"] == b["method"] else 0.1 for b in points] for a in points
    ]  # fmt: skip
    moved = {"lora": 0.5, "coto": 0.8, "copra": 0.9}
    early = [{"method": p["method"], "seed": p["seed"], "learning_rate": p["learning_rate"],
              "distance": moved[p["method"]] + 0.02 * p["seed"]} for p in points]  # fmt: skip
    data = {"points": points, "cosine": cosine, "early_distance": early}
    return [record("similarity", data, tasks=["sst2"], on="delta")]


def sweep() -> list[Result]:
    grid = {"rates": (0.001, 0.004, 0.016), "steps": (75, 150, 300)}
    made = runs(methods=("lora", "copra"), tasks=("agnews_sweep",), **grid)
    for rate, n in itertools.product(grid["rates"], grid["steps"]):
        made += lines(("lora", "copra"), ("agnews_sweep",), points=3, learning_rate=rate, max_steps=n)
    return made


def schedules() -> list[Result]:
    made = []
    for name, shape in (("cosine", "cosine"), ("reversed", "reversed")):
        config = {"variant": name, "ramp_shape": shape, "p_start": 0.0, "label": name}
        made += runs(("copra",), ("sst2",), **config) + lines(("copra",), ("sst2",), **config)
    return made


def step_times() -> list[Result]:
    metrics = {"seconds_per_step/base": 0.05}
    for name, ratio in (("peft", 1.2), ("copra", 0.8)):
        metrics |= {f"seconds_per_step/{name}": 0.05 * ratio, f"ratio/{name}/base": ratio,
                    f"ratio_min/{name}/base": ratio - 0.01, f"ratio_max/{name}/base": ratio + 0.01}  # fmt: skip
    return [record("speed_step", {}, metrics, model="smollm2", precision="float32", device="cpu")]


def unknown() -> list[Result]:
    return [record("brand_new_protocol", {}, {"test/sst2/novelty": 0.125}, method="copra", task="sst2", seed=0)]


def everything() -> list[Result]:
    """At least one record of every protocol."""
    return [
        *runs(), *lines(), *lines(merge_method="mixture", points=3), *layerwise(), *planes(), *prunings(),
        *shapleys(), *shapleys(players=30, seeds=(0,)), *federated(), *multitask(), *over_steps(), *similarity(),
        *sweep(), *schedules(), *step_times(), *unknown(),
        record("evaluate", {}, {"test/sst2/accuracy": 81.0, "test/sst2/loss": 0.5}, split="test", task="sst2",
               adapter="runs/merged"),
    ]  # fmt: skip


def hostile(text: str) -> list[Result]:
    """Records whose every name is `text`."""
    named = {"model_name_or_path": text, "variant": text, "merge_method": text, "label": text}
    made = lines(("copra",), (text,)) + runs(("copra",), (text,)) + prunings(("copra",)) + planes(("copra",))
    made += shapleys(("copra",)) + layerwise(("copra",)) + multitask(("copra",)) + similarity()
    made += [record(text, {}, {f"test/{text}/accuracy": 1.0}, method=text, task=text)]
    return [record(r.protocol, _renamed(r.data, text), r.metrics, **r.config | named) for r in made]


def _renamed(data, text: str):
    """With every string of a record's data that is a name replaced."""
    if isinstance(data, dict):
        return {k: v if "correct" in k or k == "kind" else _renamed(v, text) for k, v in data.items()}
    if isinstance(data, list):
        return [_renamed(v, text) for v in data]
    return f"{text} {data}" if isinstance(data, str) else data
