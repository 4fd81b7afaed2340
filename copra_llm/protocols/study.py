"""When does leaving adapters out pay, and how should it be done? A factorial plan, run breadth first.

For every entry of a plan (`comparisons.py`):

1. the runs that decide about learning rate and steps;
2. seed after seed, every cell at its settings: train, then all that can be measured with the seeds there are: the
   lines to the seeds before, smaller variants, Shapley values, distances; then the tasks' adapters in one.

So wherever it is stopped, all tasks and cells have the same seeds, or all but one. A run that fails is named, and does
not keep the others from going on. Every run and measurement is a record, in the folders of `runs.py`, beside the run's
own `<run>.json`:

    pruned-<run>.json, layer-loss-<run>.json, distance-<run>.json, <rule>-<settings>-seeds<i>-<j>.json
    <task>+<task>/<variant>/<rule>-<run>.json        adapters of several tasks in one

What has a record is not done again.
"""

from __future__ import annotations

import itertools
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from copra_llm.adapters import AdapterWeights
from copra_llm.build import training_labels
from copra_llm.errors import InputError
from copra_llm.evaluate import Evaluation
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.protocols.comparisons import Cell, Comparison, Selection, cells, chosen_runs, tuning_runs
from copra_llm.protocols.jobs import Job, Workers
from copra_llm.protocols.layer_values import record_file as values_file
from copra_llm.protocols.multitask import merged_record
from copra_llm.protocols.plans import merge_rules
from copra_llm.protocols.pruning import EARLY
from copra_llm.protocols.runs import Run, Store, check_record, portable
from copra_llm.protocols.sweep import layer_values_of
from copra_llm.results import Result, environment, peak_memory_bytes, read_result, write_result
from copra_llm.saved_runs import step_at
from copra_llm.similarity import inner_products, relative_distance
from copra_llm.variants import finish, unfinished_file, variants_record


def run_study(
    comparisons: dict[str, Comparison],
    results: Path,
    work: Path,
    data_root: str | None,
    *,
    selection: Selection | None = None,
    others: tuple[Path, ...] = (),
    say: Callable[[str], None] = print,
    workers: int | None = None,
) -> None:
    """Do what is missing of a study's entries, one after the other.

    Args:
        comparisons: the entries by their names.
        results: records, by model, task and cell.
        work: adapters and checkpoints.
        data_root: of MTL15 and the image sets.
        selection: the part that is wanted. An entry's tuning runs are done for all of the tasks that it tunes on.
        others: folders of records like `results`; what they have at the same settings is copied.
        say: reports progress and the time left; picklable, as workers report too.
        workers: processes side by side; None: one a GPU, or one a core.

    Raises:
        InputError: if the selection names what no entry has, there is no data of a task, a record is of other settings
            than the plan's; at the end if runs have failed, or at the tenth of them.
    """
    selection = selection or Selection()
    selection.check(list(comparisons.values()))
    store, failures = Store(results, work, say, others), _Failures(say)
    with Workers(workers) as side_by_side:
        for name, whole in comparisons.items():
            for place, jobs in enumerate(filter(None, waves(store, whole, selection, data_root))):
                if place == 0:
                    _check_data(whole, selection, data_root)
                say(f"{name}: {len(jobs)} cells")
                side_by_side.run(jobs, say, failures.add)
    failures.report()


def waves(store: Store, whole: Comparison, selection: Selection, data_root: str | None) -> Iterator[list[Job]]:
    """The jobs of an entry; those of a list are independent of each other, and need those of the lists before."""
    wanted, seeds = [cell for cell in cells(whole) if selection.has(cell)], selection.seeds_of(whole)
    tasks = [task for task in whole.tasks if selection.wants(task)]
    if seeds and tasks:
        yield _tuning_jobs(store, whole, wanted, data_root)
    for seed in seeds:
        jobs = []
        for task, cell in itertools.product(tasks, wanted):
            for run in chosen_runs(whole, cell, task, record_in(store), data_root):
                if missing_of(store, whole, run, seed):
                    own = run.replace(seed=seed)
                    jobs.append(Job(f"{own.place}/{own.name}", measured, (store, whole, run, seed)))
        yield jobs
        groups = [
            run
            for run in group_runs(store, whole, wanted, seed, data_root)
            if set(run.config.data.tasks) <= set(tasks) and missing_of_group(store, whole, run)
        ]
        # Groups share tasks: what one adapter is missing is trained once, and not by several of them at a time.
        singles = {store.folder(single): single for run in groups for single in singles_of(run).values()}
        yield [
            Job(f"{s.place}/{s.name}", Store.keep_adapter, (store, s))
            for s in singles.values()
            if not store.has_adapter(s)
        ]
        yield [Job(f"{run.place}/{run.name}", merged_tasks, (store, whole, run)) for run in groups]


def _tuning_jobs(store: Store, comparison: Comparison, wanted: list[Cell], data_root: str | None) -> list[Job]:
    """The runs that are missing to decide about settings; seed by seed, since any of them may be the last."""
    deciding: dict[Path, Run] = {}
    for cell in wanted:
        deciding |= {store.record_file(run): run for run in tuning_runs(comparison, cell, data_root)}
    order = sorted(deciding.items(), key=lambda one: comparison.tuned_with.index(one[1].config.train.seed))
    return [Job(f"{run.place}/{run.name}", trained, (store, run)) for file, run in order if not file.is_file()]


def record_in(store: Store) -> Callable[[Run], Result | None]:
    """Reads a run's record among the results; None where it has none."""

    def record(run: Run) -> Result | None:
        file = store.record_file(run)
        if not file.is_file():
            return None
        result = read_result(file)
        check_record(file, result, run)
        return result

    return record


def trained(store: Store, run: Run, adapter_wanted: bool = False) -> Result:
    """A run's record; made, if there is none.

    Raises:
        InputError: if it is of other settings.
    """
    result = store.train(run, adapter_wanted)
    check_record(store.record_file(run), result, run)
    return result


def missing_of(store: Store, comparison: Comparison, run: Run, seed: int) -> list[Path]:
    """The records that a run of this seed still lacks, lines to the other seeds that have been trained included."""
    own = run.replace(seed=seed)
    wanted = [store.record_file(own)]
    if comparison.smaller():
        wanted.append(pruned_file(store, own))
    if comparison.shapley_samples:
        wanted.append(values_file(store.results / run.place, own.name, "loss"))
    if comparison.distances:
        wanted.append(distance_file(store, own))
    wanted += [store.line_file(run, pair, rule) for pair in pairs_of(store, comparison, run, seed)
               for rule in comparison.points]  # fmt: skip
    return [file for file in wanted if not file.is_file()]


def pairs_of(store: Store, comparison: Comparison, run: Run, seed: int) -> list[tuple[int, int]]:
    """The pairs of this seed with the others of the plan that have been trained, in the plan's order."""
    there = [s for s in comparison.seeds if s == seed or store.record_file(run.replace(seed=s)).is_file()]
    return [(a, b) for i, a in enumerate(there) for b in there[i + 1 :] if seed in (a, b)]


def measured(store: Store, comparison: Comparison, run: Run, seed: int) -> None:
    """Train one seed of a run, and measure what the plan wants of it and of its pairs with the seeds before."""
    own = run.replace(seed=seed)
    for file in missing_of(store, comparison, run, seed):
        store.borrow(file, own)
    missing = set(missing_of(store, comparison, run, seed))
    trained(store, own, adapter_wanted=bool(missing - {store.record_file(own)}))
    (task,) = run.config.data.tasks
    evaluator = Remembering(run.config, [task], "test")
    for pair in pairs_of(store, comparison, run, seed):
        for rule, points in comparison.points.items():
            if store.line_file(run, pair, rule) in missing:
                store.line(run, pair, rule, points, evaluator)
    if pruned_file(store, own) in missing:
        _prune(store, comparison, own, evaluator)
    if comparison.shapley_samples:
        layer_values_of(store, run, [seed], comparison.shapley_samples)
    if distance_file(store, own) in missing:
        _measure_distance(store, own)


def group_runs(store: Store, comparison: Comparison, wanted: list[Cell], seed: int, data_root: str | None) -> list[Run]:
    """One a group of tasks and cell at its settings: its `tasks` are the group's, whose adapters of this seed merge."""
    return [
        run.replace(tasks=group, seed=seed)
        for group, cell in itertools.product(comparison.groups, wanted)
        for run in chosen_runs(comparison, cell, group[0], record_in(store), data_root)
    ]


def singles_of(run: Run) -> dict[str, Run]:
    """A group's runs, one a task."""
    return {task: run.replace(tasks=[task]) for task in run.config.data.tasks}


def missing_of_group(store: Store, comparison: Comparison, run: Run) -> dict[str, Path]:
    """The records that a group of tasks lacks, by merge rule."""
    files = {rule: store.record_file(run, f"{rule}-{run.name}") for rule in comparison.points}
    return {rule: file for rule, file in files.items() if not file.is_file()}


def merged_tasks(store: Store, comparison: Comparison, run: Run) -> None:
    """Merge the adapters of a group's tasks by every rule, and evaluate each on all of them."""
    tasks = run.config.data.tasks
    singles = {task: store.adapter(single) for task, single in singles_of(run).items()}
    evaluator = Remembering(run.config, tasks, "test")
    alone = {task: evaluator(singles[task], task) for task in tasks}
    missing = missing_of_group(store, comparison, run)
    for rule in merge_rules(dict.fromkeys(missing)):
        result = merged_record(run.config, rule, singles, alone, dict.fromkeys(tasks, evaluator), {})
        write_result(missing[rule.name], portable(result, run.variant))
        store.say(f"{missing[rule.name]}: mean accuracy {result.metrics['test/mean/accuracy/merged']:.1f}")


MOST_FAILURES = 10
"""After so many something is wrong with more than a run."""


class _Failures:
    """Which jobs have failed, and why."""

    def __init__(self, say: Callable[[str], None]):
        self.say, self.sentences = say, []

    def add(self, job: Job, error: Exception) -> None:
        """Name a job that has failed, with all there is to know if its input was not what was wrong."""
        if not isinstance(error, InputError):
            self.say("".join(traceback.format_exception(error)))
        self.sentences.append(f"{job.name}: {error}")
        self.say(f"FAILED {self.sentences[-1]}")
        if len(self.sentences) == MOST_FAILURES:
            self.report()

    def report(self) -> None:
        """Raises InputError if any have."""
        if self.sentences:
            raise InputError(f"{len(self.sentences)} runs or measurements failed, the first: {self.sentences[0]}; "
                             "mend that and start the study again, which goes on with what is missing")  # fmt: skip


def _check_data(comparison: Comparison, selection: Selection, data_root: str | None) -> None:
    """Refuse what has no data before anything is trained."""
    first = cells(comparison)[0]
    run = first.run(comparison.tasks[0], *first.candidates[0], data_root)
    for task in filter(selection.wants, comparison.tasks):
        training_labels(run.config, task)


class Remembering(AdapterEvaluator):
    """An evaluator that evaluates an adapter once: the ends of many lines, and what pruning starts from, are one."""

    def __init__(self, *args):
        super().__init__(*args)
        self._known: dict[tuple[str, str], Evaluation] = {}

    def __call__(self, weights: AdapterWeights, task: str) -> Evaluation:
        key = (weights.fingerprint(), task)
        if key not in self._known:
            self._known[key] = super().__call__(weights, task)
        return self._known[key]


def pruned_file(store: Store, run: Run) -> Path:
    """Where a run's smaller variants are kept."""
    return store.record_file(run, f"pruned-{run.name}")


def distance_file(store: Store, run: Run) -> Path:
    """Where the distances that a run has travelled are kept."""
    return store.record_file(run, f"distance-{run.name}")


def _prune(store: Store, comparison: Comparison, run: Run, evaluator: AdapterEvaluator) -> None:
    (task,), record = run.config.data.tasks, pruned_file(store, run)
    variants, kept = comparison.smaller(), unfinished_file(record)
    result = variants_record(store.adapter(run), run.config, task, variants, evaluator, unfinished=kept)
    finish(record, portable(result, run.variant))
    rows = ", ".join(f"{row['name']} {row['accuracy']:.1f}" for row in result.data["rows"])
    store.say(f"{record}: {rows}")


def _measure_distance(store: Store, run: Run) -> None:
    """How long is Delta W, which starts at 0, and how far is it from the checkpoint at T/4, relative to its length?

    Where it has not moved, as after steps that all diverged, there is nothing to be relative to.
    """
    started, (task,) = time.time(), run.config.data.tasks
    final = store.adapter(run)
    step = step_at(EARLY, run.config.train.max_steps)
    (early,) = store.checkpoints(run.replace(checkpoint_at=[EARLY]), [step])
    length = float(inner_products([final])[0, 0]) ** 0.5
    result = Result(
        protocol="distance",
        config=run.config.flat() | {"task": task},
        metrics={"from_initialisation": length} | ({"from_early": relative_distance(final, early)} if length else {}),
        seconds=time.time() - started,
        peak_memory_bytes=peak_memory_bytes(),
        environment=environment(base_model=final.base_model),
    )
    write_result(distance_file(store, run), portable(result, run.variant))
