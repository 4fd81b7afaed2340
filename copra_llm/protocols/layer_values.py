"""How much of an adapter's effect does each layer bring, and how evenly is it spread?

    phi_i = Shapley value of layer i in v(S) = -loss or accuracy of the adapter in the layers of S alone

For every run of a plan, trained before: exact where all coalitions fit the budget, by estimate elsewhere; both
metrics from the same evaluations. Since the values add up to v(all layers) - v(no layer), what is compared
between methods is evenness: the share of the top third, and Gini's coefficient.

One record an adapter and metric. What has a record is not computed again; evaluations are kept as they come in, so
a stopped adapter goes on after its last one.

Source: CopRA (arXiv 2410.22911), section 3.3, equation 3 and figure 2.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from copra_llm.coalitions import METRICS, CoalitionGame
from copra_llm.errors import InputError, nearest
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.gates import GRANULARITIES
from copra_llm.ledger import Ledger, RecordedGame, identity
from copra_llm.protocols.jobs import Job, run_jobs
from copra_llm.protocols.plans import check_methods, need_entries
from copra_llm.protocols.runs import portable
from copra_llm.results import Result, peak_memory_bytes, write_result
from copra_llm.saved_runs import SavedRun, best_on_dev, repeated_runs
from copra_llm.shapley import ESTIMATORS, Estimate, approximate, gini, top_third_share

DEFAULT_ESTIMATOR, DEFAULT_BUDGET = "quadrature", 256
LEDGER_SUFFIX = ".evaluations.jsonl"
"""Of the file that keeps a game's evaluations."""


@dataclass(frozen=True)
class Plan:
    """Whose layers' values of one model are computed, and how."""

    tasks: list[str]
    methods: list[str]
    seeds: list[int]
    """Of the runs; each method's settings are those that all seeds were trained with (the best on dev if several)."""
    budget: int
    """Most coalitions an adapter."""
    max_eval_samples: int
    """Examples of the split."""
    per_device_eval_batch_size: int
    estimator: str = DEFAULT_ESTIMATOR
    metrics: list[str] = field(default_factory=lambda: list(METRICS))
    split: str = "dev"
    granularity: str = "layer"

    def __post_init__(self):
        need_entries(self, "tasks", "methods", "seeds", "metrics")
        check_methods(self.methods)
        for name, value, known in (
            *(("metrics", metric, METRICS) for metric in self.metrics),
            ("split", self.split, ("train", "dev", "test")),
            ("granularity", self.granularity, GRANULARITIES),
        ):
            if value not in known:
                raise InputError(f"the plan's {name} is {value!r}, but must be one of {', '.join(known)}")
        check_estimator(self.estimator)


def check_estimator(name: str) -> None:
    """Refuse an estimator that there is not, also where a small game would be enumerated in any case."""
    known = ["exact", *ESTIMATORS]
    if name not in known:
        raise InputError(f'the estimator is "{name}", but must be one of {", ".join(known)}{nearest(name, known)}')


def shapley_records(
    game: CoalitionGame,
    ledger: Ledger,
    *,
    metrics: Iterable[str],
    estimator: str = DEFAULT_ESTIMATOR,
    budget: int = DEFAULT_BUDGET,
    seed: int = 0,
    standard_error: float | None = None,
    settings: dict[str, Any] | None = None,
    done: Callable[[int], Any] = lambda n: None,
) -> list[Result]:
    """Shapley values of an adapter as result records, one a metric.

    Args:
        game: the adapter on a task.
        ledger: keeps its evaluations.
        metrics: "loss" (values in nats), "accuracy" (in percentage points), or both.
        estimator: "exact", or a name of `copra_llm.shapley.ESTIMATORS`.
        budget: most coalitions to evaluate; where it reaches all of them, the values are exact.
        seed: of the coalitions.
        standard_error: stop as soon as no player's is larger, in the metric's unit.
        settings: more entries for the records' config.
        done: called with a number of coalitions as they come in.

    Raises:
        InputError: if the estimator is unknown or the budget is too small for it.
    """
    check_estimator(estimator)
    evaluator = game.evaluator
    records = []
    for metric in metrics:
        recorded = RecordedGame(game, ledger, metric, done=done)
        estimate = approximate(
            recorded, game.n_players, budget=budget, estimator=estimator, seed=seed, wanted_error=standard_error,
            batch_size=max(budget, 2),
        )  # fmt: skip
        config = evaluator.config.flat()
        own = {
            "task": game.split.task.name,
            "split": evaluator.split,
            "metric": metric,
            "estimator": estimate.estimator,
            "budget": budget,
            "estimator_seed": seed,
            "wanted_standard_error": standard_error,
            "trained_granularity": config["granularity"],
            "granularity": game.granularity,
            "n_groups": game.n_groups,
            "n_examples": len(game.split),
        }
        record = Result(
            protocol="shapley",
            config=config | own | (settings or {}),
            metrics=_evenness(estimate, f"{evaluator.split}/{game.split.task.name}"),
            seconds=recorded.seconds,
            peak_memory_bytes=peak_memory_bytes(),
            data=_data(estimate, game),
            environment=evaluator.environment(),
        )
        records.append(record)
        done = _nothing  # the next metric asks for what is known
    return records


def run_plan(
    model: str,
    plan: Plan,
    results: Path,
    runs: Path,
    work: Path,
    data_root: str | None = None,
    say: Callable[[str], None] = print,
    workers: int | None = 1,
) -> None:
    """Do what is missing of a plan.

    Args:
        model: folder of its runs.
        plan: what is computed.
        results: records go to `results/<model>/<task>/<method>/*.json`.
        runs: folder of the runs, `runs/<model>/<task>/<method>/<run>/`.
        work: evaluations are kept here, under the same names.
        data_root: of MTL15.
        say: reports progress.
        workers: processes side by side, each with a task and method of its own; None: one a GPU, or one a core.
    """
    jobs = []
    for task, method in itertools.product(plan.tasks, plan.methods):
        place = Path(model) / task / method
        chosen = best_on_dev(repeated_runs(runs / place, plan.seeds), task)
        arguments = (chosen, plan, results / place, work / place, task, data_root, say)
        jobs.append(Job(str(place), adapters_records, arguments))
    run_jobs(jobs, workers, say)


def record_file(results: Path, run: str, metric: str, granularity: str = "layer") -> Path:
    """Where the values of a run's adapter are kept, by the name of the run."""
    return results / f"{granularity}-{metric}-{run}.json"


def adapters_records(
    chosen: Sequence[SavedRun],
    plan: Plan,
    results: Path,
    work: Path,
    task: str,
    data_root: str | None,
    say: Callable[[str], None],
    variant: str | None = None,
) -> None:
    """The missing records of some runs of one task and method (or variant of it), on one loaded model."""
    evaluator = None
    for run in chosen:
        name = run.folder.name
        paths = {metric: record_file(results, name, metric, plan.granularity) for metric in plan.metrics}
        missing = [metric for metric, path in paths.items() if not path.is_file()]
        if not missing:
            continue
        if evaluator is None:
            config = run.config.replace(
                data_root=data_root, max_eval_samples=plan.max_eval_samples,
                per_device_eval_batch_size=plan.per_device_eval_batch_size,
            )  # fmt: skip
            evaluator = AdapterEvaluator(config, [task], plan.split)
        game = CoalitionGame(evaluator, run.weights, task, granularity=plan.granularity)
        if game.note:
            say(f"{run.folder}: {game.note}")
        ledger = Ledger(work / name / f"{plan.split}-{plan.granularity}{LEDGER_SUFFIX}", identity(game))
        settings = {"adapter": name, "seed": run.config.train.seed}
        for record in shapley_records(
            game, ledger, metrics=missing, estimator=plan.estimator, budget=plan.budget, settings=settings
        ):
            path = paths[record.config["metric"]]
            write_result(path, portable(record, variant))
            share = record.metrics[f"{plan.split}/{task}/top_third_share"]
            say(f"{path}: the top third holds {100 * share:.0f} % in {record.seconds:.0f} s")


def _evenness(estimate: Estimate, where: str) -> dict[str, float]:
    return {
        f"{where}/top_third_share": top_third_share(estimate.values),
        f"{where}/gini": gini(estimate.values),
    }


def _data(estimate: Estimate, game: CoalitionGame) -> dict[str, Any]:
    exact = estimate.estimator == "exact"
    errors = [None if exact or not math.isfinite(e) else float(e) for e in estimate.standard_errors]
    return {
        "players": game.players,
        "values": estimate.values.tolist(),
        "standard_errors": errors,
        "v_empty": estimate.v_empty,
        "v_full": estimate.v_full,
        "evaluations": estimate.evaluations,
        "efficiency_gap": estimate.efficiency_gap,
        "unbiased": estimate.unbiased,
        "note": game.note,
    }


def _nothing(n: int) -> None:
    """Reports nothing."""
