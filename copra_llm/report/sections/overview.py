"""What was run, with which settings, on what; and what a reader must know before believing it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from copra_llm.figures.groups import label_of, model_of, rank, tasks_of
from copra_llm.report.document import Folded, Section
from copra_llm.report.records import Found
from copra_llm.report.tables import Table, table
from copra_llm.results import Result

KINDS = {
    "train": "training run",
    "evaluate": "evaluation",
    "interpolation": "line between two adapters",
    "layerwise": "layer-wise line between two adapters",
    "plane": "plane through three adapters",
    "pruning": "pruned adapter",
    "shapley": "Shapley values of an adapter's layers",
    "federated": "federated run",
    "multitask": "merge of several tasks' adapters",
    "merge_over_steps": "merge along training steps",
    "similarity": "similarity of adapters",
    "speed_step": "time of a step",
}
"""What a record of each known protocol is."""

NAMED = {"seed", "seeds", "task", "tasks", "label", "variant", "method", "learning_rate", "max_steps"}
"""Settings that every table names itself."""


def overview_section(found: Found) -> Section:
    results = found.results
    more = [made for made in (_settings_table(results), _environment_table(results)) if made.rows]
    blocks = [_what_table(results), Folded("Settings, machines and versions", more)]
    return Section("What was run", " ".join(_remarks(found)), blocks)


def other_section(results: Sequence[Result]) -> Section | None:
    """Records of protocols that this page has no section for: named, with every metric they hold."""
    others = [r for r in results if r.protocol not in KINDS]
    if not others:
        return None
    counts = {p: sum(r.protocol == p for r in others) for p in sorted({r.protocol for r in others})}
    named = ", ".join(f"{p} ({n})" for p, n in counts.items())
    rows = [
        (r.protocol, model_of(r) if _has_model(r) else "", ", ".join(tasks_of(r)),
         label_of(r) if "method" in r.config else "", _seed(r), name, value)
        for r in sorted(others, key=lambda r: (r.protocol, model_of(r), r.created))
        for name, value in (r.metrics or {"(no metric)": None}).items()
    ]  # fmt: skip
    columns = [("protocol",), ("model",), ("task",), ("method",), ("seed",), ("metric",), ("value", ".4g")]
    text = f"This page has no section for records of the protocol {named}. These are the numbers they hold."
    return Section("Other records", text, [table("Metrics of other records", columns, rows, 2)])


def evaluation_section(results: Sequence[Result]) -> Section | None:
    rows = []
    for r in (r for r in results if r.protocol == "evaluate"):
        where = f"{r.config['split']}/{r.config['task']}"
        values = [r.metrics.get(f"{where}/{name}") for name in ("accuracy", "loss")]
        rows.append((model_of(r), r.config["task"], _last(r.config.get("adapter")), r.config["split"], *values))
    columns = [("model",), ("task",), ("adapter",), ("split",), ("accuracy", ".1f"), ("loss", ".3f")]
    text = "Adapters that were evaluated by themselves. Accuracy in percent, loss in nats."
    return Section("Evaluations", text, [table("Evaluations", columns, rows, 3)]) if rows else None


def summary(results: Sequence[Result]) -> str:
    """What the page holds, in a sentence or two."""
    labels = sorted({label_of(r) for r in results if "method" in r.config}, key=rank)
    models, tasks = sorted({model_of(r) for r in results if _has_model(r)}), _tasks(results)
    said = f"{_count(len(results), 'result record')}"
    said += f" of {_listed(labels, 6)}" if labels else ""
    said += f" on {_listed(models, 4)}" if models else ""
    said += f", {_count(len(tasks), 'task')} ({_listed(tasks, 15)})" if tasks else ""
    return said + ". Intervals are 95 %; every number can be saved as CSV."


def footer(results: Sequence[Result]) -> str:
    versions = next((r.environment.get("versions") for r in results if r.environment.get("versions")), {})
    newest = max(r.created for r in results)[:10]
    made = f"From {_count(len(results), 'result record')}, the newest of {newest}"
    return "; ".join([made, ", ".join(f"{k} {v}" for k, v in versions.items() if v)]) if versions else made


def _what_table(results: Sequence[Result]) -> Table:
    rows = []
    for protocol in sorted({r.protocol for r in results}, key=lambda p: (list(KINDS) + [p]).index(p)):
        same = [r for r in results if r.protocol == protocol]
        rows.append((
            KINDS.get(protocol, f"{protocol} (no section of its own)"), len(same),
            _listed(sorted({model_of(r) for r in same if _has_model(r)}), 4), _listed(_tasks(same), 15),
            _listed(sorted({label_of(r) for r in same if "method" in r.config}, key=rank), 9),
            _listed(sorted({_seed(r) for r in same} - {""}), 12), sum(r.seconds for r in same) / 3600,
        ))  # fmt: skip
    columns = [("what",), ("records", "d"), ("models",), ("tasks",), ("methods",), ("seeds",), ("hours", ".2f")]
    return table("Records by kind", columns, rows)


def _settings_table(results: Sequence[Result]) -> Table:
    """Settings of all runs: one value, or the values there are."""
    values: dict[str, set[str]] = defaultdict(set)
    for r in results:
        for key, value in r.config.items():
            if value is not None and value != [] and key not in NAMED:
                values[key].add(_shown(value))
    rows = [(key, _listed(sorted(values[key]), 8)) for key in sorted(values)]
    return table("Settings", [("setting",), ("value",)], rows, note="Where runs differ, all values are listed.")


def _environment_table(results: Sequence[Result]) -> Table:
    values: dict[str, set[str]] = defaultdict(set)
    for r in results:
        flat = {k: v for k, v in r.environment.items() if k != "versions"} | (r.environment.get("versions") or {})
        for key, value in flat.items():
            if value is not None:
                values[key].add(_shown(value)[:12] if key == "git_commit" else _shown(value))
    rows = [(key, _listed(sorted(values[key]), 8)) for key in sorted(values)]
    return table("Machines and versions", [("what",), ("value",)], rows)


def _remarks(found: Found) -> list[str]:
    """What a reader must know."""
    results = found.results
    said = []
    if found.copies:
        said.append(f"{_count(found.copies, 'file')} held a copy of another record and {_is(found.copies)} left out.")
    for name, others in found.other_names.items():
        said.append(f"{name} is also called {_listed(others, 4)} in some records: the weights are the same.")
    bases = defaultdict(set)
    for r in results:
        if r.environment.get("base_fingerprint"):
            bases[model_of(r)].add(r.environment["base_fingerprint"])
    for model in sorted(m for m, prints in bases.items() if len(prints) > 1):
        said.append(f"The weights of {model} are not the same in all records: {len(bases[model])} fingerprints.")
    for key, what in (("init_seed", "initialisation"), ("data_seed", "order of the data"), ("mask_seed", "masks")):
        pinned = sum(r.config.get(key) is not None for r in results)
        if pinned:
            said.append(f"In {pinned} of them the seed of the {what} is pinned, so that runs of other seeds share it.")
    if any(r.protocol == "interpolation" for r in results) and not any(
        r.config.get("init_seed") is not None for r in results
    ):
        said.append("Adapters that are merged differ in initialisation, order of the data and masks.")
    return said


def _has_model(r: Result) -> bool:
    return "model_name_or_path" in r.config


def _tasks(results: Iterable[Result]) -> list[str]:
    return sorted({task for r in results for task in tasks_of(r) if task})


def _seed(r: Result) -> str:
    seeds = r.config.get("seeds") or r.config.get("seed")
    return "" if seeds is None else " + ".join(map(str, seeds)) if isinstance(seeds, list) else str(seeds)


def _last(path: Any) -> str:
    return "/".join(str(path).rstrip("/").split("/")[-3:])


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _listed(names: Sequence[str], most: int) -> str:
    """Names with commas; of many the first."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _is(n: int) -> str:
    return "is" if n == 1 else "are"
