"""What lies between runs that differ only in their seed: layer by layer, on a plane, and as directions?

For every model of a plan, on the runs that lie below a folder (`<model>/<task>/<method>/<run>/`, as other protocols
leave them):

1. train what the plan wants and the folder lacks: methods x learning rates x seeds, with the checkpoint at T/4;
2. of every task and method take the settings that were best on dev (mean over seeds), and evaluate every layer's
   line between all ordered pairs of seeds: the first adapter lends the layers that stay;
3. evaluate the plane through three seeds' adapters;
4. compare all runs of a task: cosines, t-SNE, distance from T/4.

Every analysis leaves one result record, and what has one is not done again.

Sources: CopRA (arXiv 2410.22911), section 1 (layer-wise barriers are minimal) and figure 5a (adapters of CopRA are
not more similar than LoRA's); Adilova et al. (ICLR 2024); Garipov et al. (NeurIPS 2018).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.interpolate import line
from copra_llm.layerwise import layerwise_record
from copra_llm.plane import plane_record
from copra_llm.portable import portable_name
from copra_llm.protocols.jobs import Job, Workers
from copra_llm.protocols.plans import check_runs, need_entries
from copra_llm.protocols.runs import Run, Store, portable
from copra_llm.results import read_result, write_result
from copra_llm.saved_runs import SavedRun, best_on_dev, find_runs, repeated_runs
from copra_llm.similarity import KINDS, similarity_record

SPLIT = "test"
METHOD = "fusion"


@dataclass(frozen=True)
class Plan:
    """What is looked at on one model."""

    tasks: list[str]
    methods: list[str]
    seeds: list[int]
    """Of the runs whose adapters are interpolated; the first three are a plane's corners."""
    points: int
    """Of every layer's line."""
    plane_tasks: list[str]
    """Tasks with planes: each costs grid x grid + 4 evaluations a method."""
    grid: int
    """Points along a plane's side."""
    train_tasks: list[str]
    """Tasks whose runs are trained where they are missing; the others' must lie there."""
    learning_rate: list[float]
    """Of the runs that are trained."""
    max_steps: int
    settings: dict[str, Any]
    """Everything else of the runs that are trained, by the flags' names."""

    def __post_init__(self):
        need_entries(self, "tasks", "methods")
        if len(set(self.seeds)) < 2 or (self.plane_tasks and len(set(self.seeds)) < 3):
            raise InputError(f"the plan's seeds are {self.seeds}; a line needs two different ones, a plane three")
        check_runs([*self.tasks, *self.plane_tasks, *self.train_tasks], self.methods, self.settings)
        line(self.points)
        if self.grid < 2:
            raise InputError(f"the plan's grid is {self.grid}, but must be at least 2")


def run_plan(
    model: str,
    plan: Plan,
    results: Path,
    runs: Path,
    data_root: str | None = None,
    say: Callable[[str], None] = print,
    workers: int | None = 1,
) -> None:
    """Do what is missing of a plan.

    Args:
        model: `--model_name_or_path`.
        plan: what is looked at.
        results: records go to `results/<model>/<task>/[<method>/]*.json`.
        runs: folder of the runs, `runs/<model>/<task>/<method>/<run>/`.
        data_root: of MTL15.
        say: reports progress.
        workers: processes side by side, each with a task and method of its own; None: one a GPU, or one a core.
    """
    place, store = Path(portable_name(model)), Store(results, runs, say)
    wanted = [
        Run(
            RunConfig().replace(
                **plan.settings | {"model_name_or_path": model, "tasks": [task], "method": method, "seed": seed,
                                   "learning_rate": rate, "max_steps": plan.max_steps, "data_root": data_root}
            )
        )
        for task in plan.tasks if task in plan.train_tasks
        for method, rate, seed in itertools.product(plan.methods, plan.learning_rate, plan.seeds)
    ]  # fmt: skip
    with Workers(workers) as side_by_side:
        side_by_side.run([Job(f"{run.place / run.name}", store.train, (run, True)) for run in wanted], say)
        jobs = []
        for task, method in itertools.product(plan.tasks, plan.methods):
            chosen = best_on_dev(repeated_runs(runs / place / task / method, plan.seeds), task)
            folder = results / place / task / method
            jobs.append(Job(f"{folder}", interpolate_seeds, (chosen, folder, task, plan, data_root, say)))
        side_by_side.run(jobs, say)
    for task, on in itertools.product(plan.tasks, KINDS):
        compare(find_runs(runs / place / task), results / place / task / f"similarity-{on}.json", on, say)


def interpolate_seeds(
    chosen: list[SavedRun], folder: Path, task: str, plan: Plan, data_root: str | None, say: Callable[[str], None]
) -> None:
    """One task and method: the layers' lines of all ordered pairs, and the plane of the first three."""
    name = f"lr{chosen[0].settings['learning_rate']:g}-steps{chosen[0].steps()}"
    by_seed = {run.settings["seed"]: run for run in chosen}
    config = chosen[0].config.replace(data_root=data_root)
    evaluator = AdapterEvaluator(config, [task], SPLIT)
    for pair in itertools.permutations(by_seed, 2):
        path = folder / f"layerwise-{METHOD}-{name}-seeds{pair[0]}-{pair[1]}.json"
        if not path.is_file():
            record = layerwise_record(
                [by_seed[seed].weights for seed in pair], config, task, method=METHOD, points=plan.points, split=SPLIT,
                settings={"seeds": list(pair)}, evaluator=evaluator,
            )  # fmt: skip
            write_result(path, portable(record))
            loss = record.metrics[f"{SPLIT}/{task}/loss_averaging_barrier_mean"]
            say(f"{path}: loss gained a layer {loss:.3f} in {record.seconds:.0f} s")
    corners = list(by_seed)[:3]
    path = folder / f"plane-{name}-seeds{'-'.join(map(str, corners))}.json"
    if task in plan.plane_tasks and not path.is_file():
        record = plane_record(
            [by_seed[seed].weights for seed in corners], config, task, points=plan.grid, split=SPLIT,
            labels=[f"seed {seed}" for seed in corners], settings={"seeds": corners}, evaluator=evaluator,
        )  # fmt: skip
        write_result(path, portable(record))
        centre = record.metrics[f"{SPLIT}/{task}/accuracy_centre"]
        say(f"{path}: fused {centre:.1f} in {record.seconds:.0f} s")


def compare(runs: list[SavedRun], path: Path, on: str, say: Callable[[str], None]) -> None:
    """All runs of a task side by side; done again if runs have come or gone."""
    runs = [run for run in runs if run.settings]
    if path.is_file():
        before = [(p["method"], p["label"]) for p in read_result(path).data["points"]]
        if before == [(run.settings["method"], run.label) for run in runs]:
            return
    record = similarity_record(runs, on=on)
    write_result(path, portable(record))
    say(f"{path}: {', '.join(f'{name} {value:.2f}' for name, value in record.metrics.items())}")
