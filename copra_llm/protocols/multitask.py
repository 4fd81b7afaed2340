"""How good is one adapter, merged from adapters of several tasks, on each of them?

    A = merge(A_1, ..., A_n),      A_i trained on task i alone
    normalised accuracy on task i = 100 * accuracy(A, i) / accuracy(A_i, i)      [percent]

The tasks share the base model and the adapter; an encoder answers each with that task's own head, which the merged
adapter carries along. The adapters are ordinary runs, of this protocol or of any other that keeps them in the same
folder (`runs.py`); what has a record is not done again.

Source: CopRA (arXiv 2410.22911), section 3.1 and table 1 (two tasks, fusion); the normalisation is that of KnOTS
(arXiv 2410.19735) and others.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from copra_llm.adapters import AdapterWeights
from copra_llm.config import RunConfig, typed_settings
from copra_llm.errors import InputError
from copra_llm.evaluate import Evaluation
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.merge import check_weights
from copra_llm.portable import portable_name
from copra_llm.protocols.jobs import Job, run_jobs
from copra_llm.protocols.plans import Rule, check_runs, merge_rules, need_entries, tuned_settings
from copra_llm.protocols.runs import Run, Store, portable
from copra_llm.results import Result, pack_bits, peak_memory_bytes, write_result


@dataclass(frozen=True)
class MultiTask:
    """Tasks whose adapters are merged, and how."""

    model: str
    groups: list[list[str]]
    """Tasks that are merged with each other; the first one's adapter comes first."""
    methods: list[str]
    seeds: list[int]
    """One adapter a task and seed; those of equal seeds are merged."""
    merges: dict[str, Any]
    """`{rule: {option: value}}`, see `merge_rules`."""
    settings: dict[str, Any]
    """Of the single runs, by the flags' names."""
    tuned: dict[str, Any] = field(default_factory=dict)
    """`{task: {method: {setting: value}}}`, over `settings`."""
    task_settings: dict[str, Any] = field(default_factory=dict)
    """`{task: {setting: value}}`, over `settings`: the conversations that make up each task."""

    def __post_init__(self):
        need_entries(self, "groups", "methods", "seeds", "merges")
        merge_rules(self.merges)
        for group in self.groups:
            if len(group) < 2:
                raise InputError(f"the plan's groups hold {group}, but tasks can only be merged from two on; add one")
            RunConfig().replace(tasks=group)
            for task in group:
                check_runs([task], self.methods, self.settings | self._own(task))
            for task, method in itertools.product(group, self.methods):
                self.config(task, method, self.seeds[0], None)

    def config(self, task: str, method: str, seed: int, data_root: str | None) -> RunConfig:
        """The settings of the run on one task alone."""
        own = {"model_name_or_path": self.model, "seed": seed, "data_root": data_root}
        return RunConfig().replace(**tuned_settings(self, task, method) | self._own(task) | own)

    def evaluators(self, tasks: list[str], data_root: str | None) -> dict[str, AdapterEvaluator]:
        """What evaluates each task on test: one loaded model, or one each where the tasks have data of their own."""
        method, seed = self.methods[0], self.seeds[0]
        if any(self._own(task) for task in tasks):
            configs = {task: self.config(task, method, seed, data_root) for task in tasks}
            return {task: AdapterEvaluator(config, [task], "test") for task, config in configs.items()}
        return dict.fromkeys(tasks, AdapterEvaluator(self.config(tasks[0], method, seed, data_root), tasks, "test"))

    def _own(self, task: str) -> dict[str, Any]:
        own = self.task_settings.get(task, {})
        if not isinstance(own, dict):
            raise InputError(
                f"the plan's task_settings have {own!r} for {task}, but must hold `setting: value` entries"
            )
        return typed_settings(Path("the plan's task_settings"), own)


def run_multitask(
    plan: MultiTask,
    results: Path,
    work: Path,
    data_root: str | None,
    say: Callable[[str], None] = print,
    workers: int | None = None,
) -> None:
    """Do what is missing of a plan.

    Args:
        plan: the tasks and how they are merged.
        results: records go to `results/<model>/<task>+<task>.../<method>/<rule>-seed<s>.json`.
        work: the single runs, as `Store` keeps them; those that are there are not trained again.
        data_root: of MTL15.
        say: reports progress and the time left; picklable, as workers report too.
        workers: processes side by side, each with a method and seed of its own; None: one a GPU, or one a core.
    """
    store = Store(results, work, say)
    jobs = [
        Job(f"{plan.model}, {method}, seed {seed}", merge_groups, (store, plan, method, seed, data_root))
        for method, seed in itertools.product(plan.methods, plan.seeds)
    ]
    run_jobs(jobs, workers, say)


def merge_groups(store: Store, plan: MultiTask, method: str, seed: int, data_root: str | None) -> None:
    """All groups of tasks at one method and seed, by every rule that has no record."""
    place = store.results / portable_name(plan.model)
    records = [
        (group, rule, place / "+".join(group) / method / f"{rule.name}-seed{seed}.json")
        for group, rule in itertools.product(plan.groups, merge_rules(plan.merges))
    ]
    missing = [entry for entry in records if not entry[2].is_file()]
    if not missing:
        return
    tasks = list(dict.fromkeys(task for group, _, _ in missing for task in group))
    singles = {task: store.adapter(Run(plan.config(task, method, seed, data_root))) for task in tasks}
    evaluators = plan.evaluators(tasks, data_root)
    alone = {task: evaluators[task](singles[task], task) for task in tasks}
    for group, rule, record in missing:
        config = plan.config(group[0], method, seed, data_root).replace(tasks=group)
        own = {task: plan.task_settings.get(task, {}) for task in group}
        result = merged_record(config, rule, {task: singles[task] for task in group}, alone, evaluators,
                               {"task_settings": own} if plan.task_settings else {})  # fmt: skip
        write_result(record, portable(result))
        single, merged = (result.metrics[f"test/mean/accuracy/{which}"] for which in ("single", "merged"))
        store.say(f"{record}: mean accuracy {merged:.1f}, of the single adapters {single:.1f}")


def merged_record(
    config: RunConfig,
    rule: Rule,
    singles: dict[str, AdapterWeights],
    alone: dict[str, Evaluation],
    evaluators: dict[str, AdapterEvaluator],
    settings: dict[str, Any],
) -> Result:
    """Merge adapters of several tasks and evaluate the result on each of them.

    Args:
        config: of the first task's run, kept in the record.
        rule: merges the adapters, with its own default weights.
        singles: the adapters by task, in the order of merging.
        alone: how good each is on its task, by task.
        evaluators: the model with each task's data, all of one split.
        settings: more entries for the record's config.
    """
    first = next(iter(evaluators.values()))
    started = time.time()
    merged = rule(list(singles.values()))
    metrics: dict[str, float] = {}
    correct: dict[str, str] = {}
    for task in singles:
        outcome, single = evaluators[task](merged, task), alone[task]
        where = f"{first.split}/{task}"
        metrics |= {
            f"{where}/accuracy/single": single.accuracy,
            f"{where}/accuracy/merged": outcome.accuracy,
            f"{where}/accuracy/normalised": normalised(outcome.accuracy, single.accuracy),
            f"{where}/loss/single": single.loss,
            f"{where}/loss/merged": outcome.loss,
        }
        correct[f"correct/{where}"] = pack_bits(outcome.correct)
        correct[f"correct/{where}/single"] = pack_bits(single.correct)
    for name in ("accuracy/single", "accuracy/merged", "accuracy/normalised"):
        values = [metrics[f"{first.split}/{task}/{name}"] for task in singles]
        metrics[f"{first.split}/mean/{name}"] = float(np.mean(values))
    about = {
        "merge_method": rule.method, "merge_options": rule.options, "merge_name": rule.name,
        "weights": check_weights(rule.method, len(singles), None), "split": first.split,
    }  # fmt: skip
    return Result(
        protocol="multitask",
        config=config.flat() | about | settings,
        metrics=metrics,
        seconds=time.time() - started,
        peak_memory_bytes=peak_memory_bytes(),
        data=correct,
        environment=first.environment(),
    )


def normalised(merged: float, single: float) -> float:
    """Percent of the single task's accuracy; NaN if that is 0."""
    return 100.0 * merged / single if single else float("nan")
