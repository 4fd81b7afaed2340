"""How good is an adapter when parts of it are taken away?

For every run of a plan, trained before: each structured variant, the unstructured curves over densities, and
the quantised ones, evaluated on one loaded model; beside it the same for the checkpoint at T/4 ("Early CopRA"),
which is trained again where a run has kept none.

One record an adapter. What has a record is not evaluated again, and a stopped adapter goes on after its last
variant.

Source: CopRA (arXiv 2410.22911), section 3.2 and figure 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from copra_llm.adapter_files import RESULT
from copra_llm.adapters import load_adapter_weights
from copra_llm.errors import InputError
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.protocols.jobs import Job, run_jobs
from copra_llm.protocols.plans import check_methods, need_entries
from copra_llm.protocols.runs import portable
from copra_llm.prune import Variant, structured_names
from copra_llm.results import Result
from copra_llm.saved_runs import SavedRun, checkpoint_folder, read_run, repeated_runs, step_at
from copra_llm.train import train_adapter
from copra_llm.variants import figure_variants, finish, loaded_by, unfinished_file, variants_record

EARLY = 0.25
"""The fraction of the run after which the early checkpoint is taken."""


@dataclass(frozen=True)
class Plan:
    """Which runs of one model are pruned, and how."""

    tasks: list[str]
    methods: list[str]
    seeds: list[int]
    densities: list[float]
    """Of the unstructured curves."""
    by: list[str]
    """How their entries are chosen: a curve each."""
    quantise: list[str]
    early_tasks: list[str]
    """Where the checkpoint at T/4 is evaluated too; it must be trained again if the run has not kept it."""
    early_methods: list[str]
    structured: list[str] = field(default_factory=list)
    """Which layers and modules are kept, by name; empty: all kinds that there are."""
    variants: list[str] = field(default_factory=list)
    """Names of schedules beside the methods, as a sweep has trained them."""

    def __post_init__(self):
        need_entries(self, "tasks", "methods" if not self.variants else "variants", "seeds")
        check_methods([*self.methods, *self.early_methods])
        self.smaller([], 0)

    def kept(self, names: Sequence[str]) -> list[str]:
        """Those of an adapter's structured variants that are wanted.

        Raises:
            InputError: if it has none of a name that is.
        """
        missing = next((name for name in self.structured if name not in names), None)
        if missing is not None:
            raise InputError(f"the plan's structured has {missing}, but the adapter has {', '.join(names)}; "
                             "name some of these")  # fmt: skip
        return self.structured or list(names)

    def smaller(self, keep: Iterable[str], seed: int) -> list[Variant]:
        """What is evaluated of an adapter."""
        return figure_variants(keep, seed, self.densities, self.by, self.quantise)


def run_plan(
    model: str,
    plan: Plan,
    runs: Path,
    results: Path,
    work: Path,
    data_root: str | None,
    say: Callable[[str], None] = print,
    workers: int | None = 1,
) -> None:
    """Do what is missing of a plan.

    Args:
        model: name of the folder below `runs`.
        plan: what is wanted.
        runs: adapters lie in `runs/<model>/<task>/<method>/<run>/`, as training writes them.
        results: records go to `results/<model>/<task>/<method>/<run>[-early].json`.
        work: runs without a checkpoint at T/4 are trained again here.
        data_root: of MTL15; None: as the runs' settings say.
        say: reports progress.
        workers: processes side by side, each with a task and method of its own; None: as many as the machine has
            GPUs, or cores.
    """
    jobs = []
    for task, method in itertools.product(plan.tasks, [*plan.methods, *plan.variants]):
        place = Path(model) / task / method
        found = [run for runs_of in repeated_runs(runs / place, plan.seeds) for run in runs_of]
        jobs.append(
            Job(f"{place}", prune_runs, (plan, task, method, found, results / place, work / place, data_root, say))
        )
    run_jobs(jobs, workers, say)


def prune_runs(
    plan: Plan,
    task: str,
    method: str,
    runs: Sequence[SavedRun],
    results: Path,
    work: Path,
    data_root: str | None,
    say: Callable[[str], None],
) -> None:
    """All adapters of one task and method, or variant; one loaded model serves them."""
    early = task in plan.early_tasks and method in plan.early_methods
    evaluator: AdapterEvaluator | None = None
    for run, checkpoint in itertools.product(runs, ("final", "early") if early else ("final",)):
        record = results / (f"{run.folder.name}.json" if checkpoint == "final" else f"{run.folder.name}-early.json")
        if record.is_file():
            continue
        config = run.config if data_root is None else run.config.replace(data_root=data_root)
        weights = run.weights if checkpoint == "final" else load_adapter_weights(early_checkpoint(run, work, data_root))
        if evaluator is None or loaded_by(evaluator.config) != loaded_by(config):
            evaluator = AdapterEvaluator(config, [task], "test")
        variants = plan.smaller(plan.kept(structured_names(weights, config.schedule.layer_pattern)), config.train.seed)
        kept = unfinished_file(record)
        result = variants_record(weights, config, task, variants, evaluator, checkpoint=checkpoint, unfinished=kept)
        finish(record, portable(result, method if method in plan.variants else None))
        say(f"{record}: {summary(result)} in {result.seconds:.0f} s")


def early_checkpoint(run: SavedRun, work: Path, data_root: str | None = None) -> Path:
    """The adapter after a quarter of the run: its own checkpoint, or that of the same run repeated below `work`.

    Raises:
        InputError: if neither record nor settings say how many steps the run had.
    """
    found = run.checkpoint(EARLY)
    if found is not None:
        return found
    if run.steps() is None:
        raise InputError(
            f"{run.folder} has no record and no max_steps, so its T/4 is not known; train with --max_steps"
        )
    again = work / run.folder.name
    if (again / RESULT).is_file() and (found := read_run(again).checkpoint(EARLY)) is not None:
        return found
    changes = {"checkpoint_at": [EARLY], "output_dir": str(again), "resume_from_checkpoint": "latest"}
    config = run.config if data_root is None else run.config.replace(data_root=data_root)
    train_adapter(config.replace(**changes), config.data.tasks, again)
    return checkpoint_folder(again, step_at(EARLY, run.steps()))


def summary(record: Result) -> str:
    """One line: the accuracy of the whole adapter and of the structured variants."""
    rows = [row for row in record.data["rows"] if row["kind"] == "structured"]
    return ", ".join(f"{row['name']} {row['accuracy']:.1f}" for row in rows)
