"""Do two runs that differ only in their seed stay good when they are merged?

For every model, task and method of a plan:

1. tune on dev: each learning rate at the smaller number of steps, then the better rate at the larger one;
2. train every seed at the settings that were best on dev (accuracy, then loss);
3. merge all pairs of seeds, by fusion and by mixture, and evaluate on test along the line.

Every run leaves one result record, and what has one is not run again (`runs.py`). Tasks and methods are independent
jobs that several processes share (`jobs.py`).

Source: CopRA (arXiv 2410.22911), section 3.1 and figure 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copra_llm.config import RunConfig
from copra_llm.protocols.jobs import Job, run_jobs
from copra_llm.protocols.plans import check_points, check_runs, need_entries
from copra_llm.protocols.runs import Run, Store
from copra_llm.saved_runs import dev_score


@dataclass(frozen=True)
class Plan:
    """What is compared on one model."""

    tasks: list[str]
    methods: list[str]
    seeds: list[int]
    learning_rate: list[float]
    """Candidates, tuned on dev."""
    max_steps: list[int]
    """Candidates in increasing order, tuned on dev."""
    points: dict[str, int]
    """Points of the curve for each merge method; 3 are the ends and the middle."""
    settings: dict[str, Any]
    """Everything else, by the flags' names."""

    def __post_init__(self):
        need_entries(self, "tasks", "methods", "seeds", "learning_rate", "max_steps")
        check_runs(self.tasks, self.methods, self.settings)
        check_points(self.points)


def run_plan(
    model: str,
    plan: Plan,
    results: Path,
    work: Path,
    data_root: str | None,
    say: Callable[[str], None] = print,
    workers: int | None = 1,
) -> None:
    """Do what is missing of a plan.

    Args:
        model: `--model_name_or_path`.
        plan: what is compared.
        results: records go to `results/<model>/<task>/<method>/*.json`, <model> being a folder's last part.
        work: adapters and checkpoints go here, under the same names.
        data_root: of MTL15.
        say: reports progress.
        workers: processes side by side, each with a task and method of its own; None: as many as the machine has
            GPUs, or cores.
    """
    store = Store(results, work, say)
    jobs = []
    for task, method in itertools.product(plan.tasks, plan.methods):
        own = {"model_name_or_path": model, "tasks": [task], "method": method, "data_root": data_root}
        run = Run(RunConfig().replace(**plan.settings | own))
        jobs.append(Job(f"{run.place}", tune_and_merge, (store, run, plan)))
    run_jobs(jobs, workers, say)


def tune_and_merge(store: Store, run: Run, plan: Plan) -> None:
    """One task and method: tune with the first seed, train all, merge all pairs."""
    (task,) = run.config.data.tasks
    first = run.replace(seed=plan.seeds[0])

    def score(rate: float, steps: int) -> tuple[float, float]:
        return dev_score(store.train(first.replace(learning_rate=rate, max_steps=steps)), task)

    rate, steps = tune(score, plan)
    store.lines(run.replace(learning_rate=rate, max_steps=steps), plan.seeds, plan.points)


def tune(score, plan: Plan) -> tuple[float, int]:
    """Learning rate and steps with the highest `score(rate, steps)`: rates first, at the fewest steps."""
    few = plan.max_steps[0]
    scores = {(rate, few): score(rate, few) for rate in plan.learning_rate}
    rate = max(scores, key=scores.get)[0]
    for steps in plan.max_steps[1:]:
        scores[rate, steps] = score(rate, steps)
    return max(scores, key=scores.get)
