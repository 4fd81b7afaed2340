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
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from copra_llm.adapters import load_adapter_weights
from copra_llm.config import RunConfig, read_settings
from copra_llm.errors import InputError
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.protocols.jobs import Job, run_jobs
from copra_llm.protocols.plans import check_runs, need_entries
from copra_llm.protocols.runs import portable
from copra_llm.prune import Variant, structured_names
from copra_llm.results import Result
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

    def __post_init__(self):
        need_entries(self, "tasks", "methods", "seeds")
        check_runs([*self.tasks, *self.early_tasks], [*self.methods, *self.early_methods], {})
        self.variants([], 0)

    def variants(self, keep: Iterable[str], seed: int) -> list[Variant]:
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
    for task, method in itertools.product(plan.tasks, plan.methods):
        place = Path(model) / task / method
        found = find_runs(runs / place, plan.seeds)
        jobs.append(
            Job(f"{place}", prune_runs, (plan, task, method, found, results / place, work / place, data_root, say))
        )
    run_jobs(jobs, workers, say)


def prune_runs(
    plan: Plan,
    task: str,
    method: str,
    runs: Sequence[Path],
    results: Path,
    work: Path,
    data_root: str | None,
    say: Callable[[str], None],
) -> None:
    """All adapters of one task and method; one loaded model serves them."""
    early = task in plan.early_tasks and method in plan.early_methods
    evaluator: AdapterEvaluator | None = None
    for run, checkpoint in itertools.product(runs, ("final", "early") if early else ("final",)):
        record = results / (f"{run.name}.json" if checkpoint == "final" else f"{run.name}-early.json")
        if record.is_file():
            continue
        config = RunConfig.from_flat(read_settings(run / "config.yaml"))
        if data_root is not None:
            config = config.replace(data_root=data_root)
        weights = load_adapter_weights(run if checkpoint == "final" else early_checkpoint(run, config, work))
        if evaluator is None or loaded_by(evaluator.config) != loaded_by(config):
            evaluator = AdapterEvaluator(config, [task], "test")
        variants = plan.variants(structured_names(weights, config.schedule.layer_pattern), config.train.seed)
        kept = unfinished_file(record)
        result = variants_record(weights, config, task, variants, evaluator, checkpoint=checkpoint, unfinished=kept)
        finish(record, portable(result))
        say(f"{record}: {summary(result)} in {result.seconds:.0f} s")


def find_runs(folder: Path, seeds: Sequence[int]) -> list[Path]:
    """The finished runs in a folder whose settings were trained with every one of the seeds, in that order.

    Runs that only tuned the settings, with one seed, are so left out.

    Raises:
        InputError: if there are none.
    """
    groups: dict[str, dict[int, Path]] = {}
    for run in sorted(p.parent for p in folder.glob("*/config.yaml") if (p.parent / "adapter").is_dir()):
        settings = read_settings(run / "config.yaml")
        own = ("seed", "output_dir", "data_root", "resume_from_checkpoint", "checkpoint_at")
        rest = json.dumps({key: value for key, value in sorted(settings.items()) if key not in own})
        groups.setdefault(rest, {})[settings.get("seed", 0)] = run
    found = [group[seed] for group in groups.values() if set(seeds) <= set(group) for seed in seeds]
    if not found:
        raise InputError(f"{folder} has no settings trained with each of the seeds {', '.join(map(str, seeds))}; "
                         "train them first, or give other --runs")  # fmt: skip
    return found


def early_checkpoint(run: Path, config: RunConfig, work: Path) -> Path:
    """The adapter after a quarter of the run: its own checkpoint, or that of the same run repeated below `work`."""
    if config.train.max_steps < 1:
        raise InputError(f"{run / 'config.yaml'} has no max_steps, so its T/4 is not known; train with --max_steps")
    name = f"checkpoint-{max(1, round(EARLY * config.train.max_steps))}"
    if (run / name).is_dir():
        return run / name
    again = work / run.name
    if not (again / "result.json").is_file() or not (again / name).is_dir():
        changes = {"checkpoint_at": [EARLY], "output_dir": str(again), "resume_from_checkpoint": "latest"}
        train_adapter(config.replace(**changes), config.data.tasks, again)
    return again / name


def summary(record: Result) -> str:
    """One line: the accuracy of the whole adapter and of the structured variants."""
    rows = [row for row in record.data["rows"] if row["kind"] == "structured"]
    return ", ".join(f"{row['name']} {row['accuracy']:.1f}" for row in rows)
