"""What do the federated and multi-task records say? Markdown tables, one column a training method.

A row holds what is compared: the same task, clients and merge rule. Means over seeds with a 95 % interval (Student's
t); the last column is the difference to plain LoRA, paired over seeds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from copra_llm.estimates import paired_estimate
from copra_llm.figures.groups import Group, rank
from copra_llm.figures.together import at_end, federated_groups, merged_by, multitask_groups, task_accuracy
from copra_llm.report.tables import Value, markdown_table
from copra_llm.results import Result

Rows = dict[tuple[str, ...], dict[str, Group]]
"""What is compared, the rule last -> by method."""
Number = Callable[[Result], float]
RULES = ("fusion", "mixture", "truncated")
"""The paper's two rules first, then their relative, then the others by name."""


def federated_table(results: Iterable[Result]) -> str:
    """One row a model, task, way of dividing the data and merge rule; accuracies in percent, losses in nats."""
    rows, names = _compared(federated_groups(results), lambda g: (g.model, g.task, _division(g), merged_by(g)))

    def last(which: str, name: str) -> Number:
        return lambda r: at_end(r, which, name)

    merged = last("merged", "accuracy")
    columns = [("model",), ("task",), ("clients",), ("merged by",), *((f"clients' acc., {n}", ".1f") for n in names),
               *((f"merged acc., {n}", ".1f") for n in names), (f"merged loss, {' / '.join(names)}",),
               *_difference_columns(names)]  # fmt: skip
    made = [
        (*key, *(_mean(of, n, last("origin", "accuracy")) for n in names),
         *(of[n].estimate(merged) if n in of else None for n in names),
         " / ".join(_text(_mean(of, n, last("merged", "loss")), ".2f") for n in names),
         *_differences(of, names, merged))
        for key, of in rows.items()
    ]  # fmt: skip
    return markdown_table(columns, made)


def multitask_table(results: Iterable[Result]) -> str:
    """`multitask_details` of the paper's two rules."""
    return multitask_details(r for r in results if r.config.get("merge_method") in ("fusion", "mixture"))


def multitask_details(results: Iterable[Result]) -> str:
    """One row a model, group of tasks and merge rule: mean accuracy over the tasks, in percent of the single ones."""
    rows, names = _compared(multitask_groups(results), lambda g: (g.model, g.task, merged_by(g)))

    def mean(which: str) -> Number:
        return lambda r: task_accuracy(r, "mean", which)

    share = mean("normalised")
    columns = [("model",), ("tasks",), ("merged by",), *((f"acc. single → merged, {n}",) for n in names),
               *((f"normalised, {n}", ".1f") for n in names), *_difference_columns(names)]  # fmt: skip
    made = [
        (*key, *(" → ".join(_text(_mean(of, n, mean(which)), ".1f") for which in ("single", "merged")) for n in names),
         *(of[n].estimate(share) if n in of else None for n in names), *_differences(of, names, share))
        for key, of in rows.items()
    ]  # fmt: skip
    return markdown_table(columns, made)


def _compared(groups: Iterable[Group], key: Callable[[Group], tuple[str, ...]]) -> tuple[Rows, list[str]]:
    """The rows in their order, and the methods that any of them has."""
    rows: Rows = defaultdict(dict)
    for g in groups:
        row = rows[key(g)]
        row[f"{g.name}, {g.run}" if g.name in row else g.name] = g

    def place(key: tuple[str, ...]) -> tuple:
        return key[:-1], RULES.index(key[-1]) if key[-1] in RULES else len(RULES), key[-1]

    names = {name for of in rows.values() for name in of}
    return {key: rows[key] for key in sorted(rows, key=place)}, sorted(names, key=rank)


def _division(g: Group) -> str:
    """How the data is divided, and in what clients differ."""
    c = g.records[0].config
    split = "iid" if c["split_kind"] == "iid" else f"Dirichlet {c['beta']:g}"
    more = [f"{c['rounds']} rounds"] * (c["rounds"] > 1)
    more += [f"{name} {' '.join(map(str, values))}" for name, values in c.get("each", {}).items()]
    return ", ".join([f"{c['clients']}, {split}", *more])


def _mean(of: dict[str, Group], name: str, value: Number) -> float | None:
    return of[name].estimate(value).mean if name in of else None


def _text(value: float | None, spec: str) -> str:
    return "–" if value is None else f"{value:{spec}}"


def _others(names: Sequence[str]) -> list[str]:
    """The methods that are compared with LoRA."""
    return [name for name in names if name != "LoRA"] if "LoRA" in names else []


def _difference_columns(names: Sequence[str]) -> list[tuple]:
    return [(f"{name} minus LoRA", ".1f") for name in _others(names)]


def _differences(of: dict[str, Group], names: Sequence[str], value: Number) -> list[Value]:
    """Each method minus LoRA over the seeds that both have."""
    values = {name: g.by_seed(value) for name, g in of.items()}
    return [paired_estimate(values.get(name, {}), values.get("LoRA", {})) for name in _others(names)]
