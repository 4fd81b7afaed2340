"""What do the federated and multi-task records say? Markdown tables, one column a training method.

A row holds what is compared: the same task, clients and merge rule. Means over seeds with a 95 % interval (Student's
t); the last column is the difference to plain LoRA, paired over seeds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from copra_llm.estimates import Estimate, seed_estimate
from copra_llm.report import NAMES, ORDER
from copra_llm.results import Result

Group = dict[str, dict[int, Result]]
"""The records of a row: by method, then by seed."""


def federated_table(results: Iterable[Result]) -> str:
    """One row a model, task, way of dividing the data and merge rule; accuracies in percent, losses in nats."""
    rows = _grouped((r for r in results if r.protocol == "federated"), _federation)
    if not rows:
        return ""
    methods = _methods(rows)
    names = [NAMES.get(method, method) for method in methods]
    head = ["model", "task", "clients", "merged by", *(f"clients' acc., {n}" for n in names)]
    head += [*(f"merged acc., {n}" for n in names), f"merged loss, {' / '.join(names)}", *_difference_heads(methods)]
    lines = []
    for key, group in rows.items():
        origin, merged, loss = (_metric(key[1], name) for name in ("accuracy/origin", "accuracy/merged", "loss/merged"))
        cells = [_mean(group, method, origin, ".1f", interval=False) for method in methods]
        cells += [_mean(group, method, merged, ".1f") for method in methods]
        cells += [" / ".join(_mean(group, method, loss, ".2f", interval=False) for method in methods)]
        lines.append([*key, *cells, *_differences(group, methods, merged)])
    return _markdown(head, lines)


def multitask_table(results: Iterable[Result]) -> str:
    """`multitask_details` of the paper's two rules."""
    return multitask_details(r for r in results if r.config.get("merge_method") in ("fusion", "mixture"))


def multitask_details(results: Iterable[Result]) -> str:
    """One row a model, group of tasks and merge rule: mean accuracy over the tasks, in percent of the single ones."""
    rows = _grouped((r for r in results if r.protocol == "multitask"), _group_of_tasks)
    if not rows:
        return ""
    methods = _methods(rows)
    names = [NAMES.get(method, method) for method in methods]
    head = ["model", "tasks", "merged by", *(f"acc. single → merged, {n}" for n in names)]
    head += [*(f"normalised, {n}" for n in names), *_difference_heads(methods)]
    lines = []
    for key, group in rows.items():
        single, merged, share = (_metric("mean", f"accuracy/{name}") for name in ("single", "merged", "normalised"))
        cells = [
            f"{_mean(group, m, single, '.1f', interval=False)} → {_mean(group, m, merged, '.1f', interval=False)}"
            for m in methods
        ]
        cells += [_mean(group, method, share, ".1f") for method in methods]
        lines.append([*key, *cells, *_differences(group, methods, share)])
    return _markdown(head, lines)


def paired_difference(group: Group, method: str, value: Callable[[Result], float]) -> Estimate:
    """`value` of a method minus plain LoRA's, over the seeds that both have; NaN where there is none."""
    ours, plain = group.get(method, {}), group.get("lora", {})
    shared = sorted(ours.keys() & plain.keys())
    if not shared:
        return Estimate(math.nan, math.nan, math.nan)
    return seed_estimate([value(ours[seed]) - value(plain[seed]) for seed in shared])


def _federation(result: Result) -> tuple[str, ...]:
    c = result.config
    split = "iid" if c["split_kind"] == "iid" else f"Dirichlet {c['beta']:g}"
    more = [f"{c['rounds']} rounds"] * (c["rounds"] > 1)
    more += [f"{name} {' '.join(map(str, values))}" for name, values in c.get("each", {}).items()]
    return c["model_name_or_path"], c["task"], ", ".join([f"{c['clients']}, {split}", *more]), _rule(c)


def _group_of_tasks(result: Result) -> tuple[str, ...]:
    return result.config["model_name_or_path"], " + ".join(result.config["tasks"]), _rule(result.config)


def _rule(config: dict) -> str:
    options = ", ".join(f"{key} {value}" for key, value in config["merge_options"].items())
    return config["merge_method"] + (f" ({options})" if options else "")


def _grouped(results: Iterable[Result], key: Callable[[Result], tuple[str, ...]]) -> dict[tuple[str, ...], Group]:
    rows: dict[tuple[str, ...], Group] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        rows[key(result)][result.config["method"]][result.config["seed"]] = result
    return {key: rows[key] for key in sorted(rows, key=lambda k: (k[:-1], _RULES.get(k[-1], len(_RULES)), k[-1]))}


_RULES = {"fusion": 0, "mixture": 1, "truncated": 2}
"""The paper's two rules first, then their relative, then the others by name."""


def _methods(rows: dict[tuple[str, ...], Group]) -> list[str]:
    present = {method for group in rows.values() for method in group}
    return sorted(present, key=lambda m: (ORDER.index(m) if m in ORDER else len(ORDER), m))


def _metric(task: str, name: str) -> Callable[[Result], float]:
    return lambda result: result.metrics[f"test/{task}/{name}"]


def _mean(group: Group, method: str, value: Callable[[Result], float], spec: str, interval: bool = True) -> str:
    if method not in group:
        return "–"
    estimate = seed_estimate([value(group[method][seed]) for seed in sorted(group[method])])
    return format(estimate if interval else estimate.mean, spec)


def _difference_heads(methods: Sequence[str]) -> list[str]:
    if "lora" not in methods:
        return []
    return [f"{NAMES.get(method, method)} minus LoRA" for method in methods if method != "lora"]


def _differences(group: Group, methods: Sequence[str], value: Callable[[Result], float]) -> list[str]:
    if "lora" not in methods:
        return []
    estimates = [paired_difference(group, method, value) for method in methods if method != "lora"]
    return ["–" if math.isnan(e.mean) else format(e, ".1f") for e in estimates]


def _markdown(head: list[str], lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(row) + " |\n" for row in [head, *lines]]
    return "".join([rows[0], "|" + "---|" * len(head) + "\n", *rows[1:]])
