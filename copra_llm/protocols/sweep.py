"""How does merging depend on learning rate, steps, seeds and the schedule?

- **Grid** (the paper's figures 5b, 6a, 6b): every variant at every learning rate and number of steps, several
  seeds, all pairs merged. A variant is a method, or a schedule of its own: another shape, p_start, ramp_fraction,
  granularity (the review's questions on what the ramp contributes).
- **Along a run** (figure 6c): the checkpoints of two runs that differ in their seeds, single and merged, at fractions
  of the training steps.

Every single run and pair is a record of its own; a stopped sweep goes on where it was.

Source: CopRA (arXiv 2410.22911), section 3.3, figures 5b and 6.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copra_llm.adapters import AdapterWeights
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.merge import merge
from copra_llm.protocols.jobs import Job, run_jobs
from copra_llm.protocols.layer_values import DEFAULT_BUDGET, Plan, adapters_records, record_file
from copra_llm.protocols.plans import check_points, check_runs, need_entries
from copra_llm.protocols.runs import Run, Store, portable
from copra_llm.results import Result, pack_bits, peak_memory_bytes, write_result
from copra_llm.saved_runs import read_run, step_at


@dataclass(frozen=True)
class Sweep:
    """A grid of runs on one model."""

    model: str
    tasks: list[str]
    variants: dict[str, dict[str, Any]]
    """Settings that make each variant, by its name: `{copra: {method: copra}, cosine: {ramp_shape: cosine}}`."""
    seeds: list[int]
    learning_rate: list[float]
    max_steps: list[int]
    points: dict[str, int]
    """Points of the curve for each merge method."""
    settings: dict[str, Any]
    """What all runs share, by the flags' names."""
    fractions: list[float] = dataclasses.field(default_factory=list)
    """Parts of a run after which its checkpoint is merged; none: no curve along the run."""
    shapley_samples: int = 0
    """Dev examples on which the layers' Shapley values are computed, in loss; 0: they are not."""

    def __post_init__(self):
        need_entries(self, "tasks", "variants", "seeds", "learning_rate", "max_steps")
        for name, own in self.variants.items():
            if not isinstance(own, dict):
                raise InputError(f"the plan's variant {name} is {own!r}, but must hold `setting: value` entries")
            check_runs(self.tasks, [own.get("method", "copra")], self.settings | own)
        check_points(self.points)
        if any(not 0.0 < fraction <= 1.0 for fraction in self.fractions):
            raise InputError(f"the plan's fractions are {self.fractions}, but must lie in (0, 1]")
        if self.fractions and len(self.seeds) < 2:
            raise InputError("the plan's fractions need two seeds to merge; give at least two")

    def runs(self, data_root: str | None) -> list[Run]:
        """One a task, variant, learning rate and number of steps; seeds are left to whoever trains them."""
        grid = itertools.product(self.tasks, self.variants.items(), self.max_steps, self.learning_rate)
        shared = self.settings | {"model_name_or_path": self.model, "data_root": data_root}
        return [
            Run(
                RunConfig().replace(**shared | own | {"tasks": [task], "max_steps": steps, "learning_rate": rate}),
                # The three methods' own runs are the same runs in every protocol.
                variant=None if own == {"method": name} else name,
            )
            for task, (name, own), steps, rate in grid
        ]


def run_sweep(
    sweep: Sweep,
    results: Path,
    work: Path,
    data_root: str | None,
    say: Callable[[str], None] = print,
    workers: int | None = None,
) -> None:
    """Do what is missing of a sweep.

    Args:
        sweep: the grid.
        results: records, by model, task and variant.
        work: adapters and checkpoints.
        data_root: of MTL15.
        say: reports progress and the time left; picklable, as workers report too.
        workers: processes side by side; None: one a GPU, or one a core.
    """
    store = Store(results, work, say)
    jobs = [Job(f"{run.place}, {run.settings_name}", _cell, (store, sweep, run)) for run in sweep.runs(data_root)]
    run_jobs(jobs, workers, say)


def _cell(store: Store, sweep: Sweep, run: Run) -> None:
    if sweep.fractions:
        along_runs(store, run, sweep.seeds, sweep.fractions, list(sweep.points))
    store.lines(run, sweep.seeds, sweep.points)
    if sweep.shapley_samples:
        layer_values_of(store, run, sweep.seeds, sweep.shapley_samples)


def layer_values_of(store: Store, run: Run, seeds: list[int], samples: int) -> None:
    """Shapley values of every seed's layers in loss, on some dev examples; exact where their number allows it."""
    config, results = run.config, store.results / run.place
    runs = [run.replace(seed=seed) for seed in seeds]
    missing = [r for r in runs if not record_file(results, r.name, "loss").is_file()]
    if not missing:
        return
    for r in missing:
        store.train(r, adapter_wanted=True)
    plan = Plan(
        tasks=config.data.tasks, methods=[config.schedule.method], seeds=seeds, metrics=["loss"],
        budget=DEFAULT_BUDGET, max_eval_samples=samples,
        per_device_eval_batch_size=config.train.per_device_eval_batch_size,
    )  # fmt: skip
    adapters_records(
        [read_run(store.folder(r)) for r in missing], plan, results, store.work / "evaluations" / run.place,
        config.data.tasks[0], config.data.data_root, store.say, run.variant,
    )  # fmt: skip


def along_runs(store: Store, run: Run, seeds: list[int], fractions: list[float], methods: list[str]) -> None:
    """Accuracy on test, single and merged by each method, of the checkpoints at fractions of the run.

    The first two seeds are merged; one record a merge method.
    """
    kept = run.replace(checkpoint_at=fractions)
    pair, (task,) = seeds[:2], run.config.data.tasks
    records = {
        method: store.results / run.place / f"{method}-steps-{run.settings_name}-seeds{pair[0]}-{pair[1]}.json"
        for method in methods
    }
    missing = {method: record for method, record in records.items() if not record.is_file()}
    if not missing:
        return
    steps = [step_at(fraction, run.config.train.max_steps) for fraction in sorted(fractions)]
    ends = [store.checkpoints(kept.replace(seed=seed), steps) for seed in pair]
    evaluator = AdapterEvaluator(run.config, [task], "test")
    for method, record in missing.items():
        result = _over_steps(evaluator, run, task, steps, ends, method, pair)
        write_result(record, portable(result, run.variant))
        store.say(f"{record}: merged {result.data['merged'][-1]:.1f} at the end")


def _over_steps(
    evaluator: AdapterEvaluator,
    run: Run,
    task: str,
    steps: list[int],
    ends: list[list[AdapterWeights]],
    method: str,
    seeds: list[int],
) -> Result:
    started = time.time()
    data: dict[str, Any] = {"steps": steps, "single": [], "merged": [], "single_loss": [], "merged_loss": []}
    correct = []
    for pair in zip(*ends, strict=True):
        single, merged = [evaluator(end, task) for end in pair], evaluator(merge(list(pair), method), task)
        data["single"].append(sum(o.accuracy for o in single) / 2)
        data["single_loss"].append(sum(o.loss for o in single) / 2)
        data["merged"].append(merged.accuracy)
        data["merged_loss"].append(merged.loss)
        correct.append(pack_bits(merged.correct))
    where = f"test/{task}"
    return Result(
        protocol="merge_over_steps",
        config=run.config.flat() | {"task": task, "split": "test", "seeds": seeds, "merge_method": method},
        metrics={f"{where}/accuracy/single": data["single"][-1], f"{where}/accuracy/merged": data["merged"][-1]},
        seconds=time.time() - started,
        peak_memory_bytes=peak_memory_bytes(),
        steps=steps[-1],
        data=data | {"correct": correct},
        environment=evaluator.environment(),
    )
