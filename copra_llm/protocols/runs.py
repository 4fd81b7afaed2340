"""Which runs does a protocol need, and where are their records and adapters?

    RESULTS/<model>/<task>/<variant>/lr<rate>-steps<steps>-seed<seed>.json      the record: small, committed
    WORK/<model>/<task>/<variant>/lr<rate>-steps<steps>-seed<seed>/             adapter, checkpoints

<variant> is the method, or the name of a schedule that is tried beside the three. What has a record is not run
again, unless its adapter is wanted and gone; so every protocol can be stopped and started, and adapters that one
protocol has trained serve the others.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from copra_llm.adapter_files import RESULT
from copra_llm.adapters import AdapterWeights, load_adapter_weights
from copra_llm.config import DEFAULTS, RunConfig
from copra_llm.errors import InputError
from copra_llm.evaluator import AdapterEvaluator
from copra_llm.interpolate import line_record
from copra_llm.portable import portable_name
from copra_llm.results import Result, read_result, write_result
from copra_llm.saved_runs import ADAPTER, checkpoint_folder
from copra_llm.settings import WITHOUT_EFFECT
from copra_llm.train import train_adapter

_FREE = WITHOUT_EFFECT - {"max_eval_samples"} | {"checkpoint_at", "max_nonfinite_steps", "seed", "model_name_or_path"}
"""Settings on which a record does not depend, and two that the names of its files say."""


@dataclass(frozen=True)
class Run:
    """One training run: its settings, and the name of its kind."""

    config: RunConfig
    """Its `tasks` are those of the run."""
    variant: str | None = None
    """Name of the schedule; None: the method's."""

    @property
    def place(self) -> Path:
        """Folder of runs of this kind, below results and work."""
        tasks = "+".join(self.config.data.tasks)
        variant = self.variant or self.config.schedule.method
        return Path(portable_name(self.config.model.model_name_or_path)) / tasks / variant

    @property
    def settings_name(self) -> str:
        return f"lr{self.config.train.learning_rate:g}-steps{self.config.train.max_steps}"

    @property
    def name(self) -> str:
        return f"{self.settings_name}-seed{self.config.train.seed}"

    def replace(self, **changes) -> Run:
        return dataclasses.replace(self, config=self.config.replace(**changes))


@dataclass(frozen=True)
class Store:
    """Where records and adapters are kept."""

    results: Path
    work: Path
    say: Callable[[str], None] = print
    """Reports progress, a line a record."""
    others: tuple[Path, ...] = ()
    """Folders of records like `results`, only read: what one of them has at the same settings is copied, not run."""

    def folder(self, run: Run) -> Path:
        """The run's adapter and checkpoints."""
        return self.work / run.place / run.name

    def train(self, run: Run, adapter_wanted: bool = False) -> Result:
        """A run's record, from disk if it is there (with its adapter beside the work, where that is wanted).

        A record that is there stays as it is, also where its adapter is gone and trained again: on another processor
        that is another adapter, by rounding, and other records beside this one are of the first.
        """
        record = self.record_file(run)
        self.borrow(record, run)
        if not record.is_file():
            result = self._train(run)
            write_result(record, portable(result, run.variant))
            task = run.config.data.tasks[0]
            self.say(f"{record}: dev {result.metrics[f'dev/{task}/accuracy']:.1f} in {result.seconds:.0f} s")
        elif adapter_wanted:
            self.keep_adapter(run)
        return read_result(record)

    def record_file(self, run: Run, name: str | None = None) -> Path:
        """The run's own record, or another one of its kind."""
        return self.results / run.place / f"{name or run.name}.json"

    def borrow(self, record: Path, run: Run) -> None:
        """Copy a missing record from another folder, if one has it at the settings of `run`."""
        for folder in self.others if not record.is_file() else ():
            other = folder / record.relative_to(self.results)
            if other.is_file() and difference(result := read_result(other), run) is None:
                write_result(record, result)
                self.say(f"{record}: taken from {folder}")
                return

    def has_adapter(self, run: Run) -> bool:
        """Whether a run's adapter has been kept."""
        return (self.folder(run) / ADAPTER).is_dir()

    def keep_adapter(self, run: Run) -> None:
        """See to it that a run's adapter is there; where it is not, train it without a record among the results."""
        if not self.has_adapter(run):
            self.say(f"{self.folder(run)}: no adapter there, training one")
            self._train(run)

    def adapter(self, run: Run) -> AdapterWeights:
        """A run's adapter; trained, if it is not there."""
        self.keep_adapter(run)
        return load_adapter_weights(self.folder(run))

    def checkpoints(self, run: Run, steps: Sequence[int]) -> list[AdapterWeights]:
        """A run's adapters after some of its steps; trained if they were not kept.

        Args:
            run: its `checkpoint_at` holds the fractions that these steps are.
            steps: in increasing order.
        """
        folder = self.folder(run)
        if not all(checkpoint_folder(folder, step).is_dir() for step in steps):
            # In a folder of its own: the run itself may have been trained before, without them.
            folder = self.work / "checkpoints" / run.place / run.name
            if not all(checkpoint_folder(folder, step).is_dir() for step in steps):
                (folder / RESULT).unlink(missing_ok=True)
                self._train(run, folder)
        return [load_adapter_weights(checkpoint_folder(folder, step)) for step in steps]

    def _train(self, run: Run, folder: Path | None = None) -> Result:
        folder = folder or self.folder(run)
        config = run.config.replace(output_dir=str(folder), resume_from_checkpoint="latest")
        return train_adapter(config, run.config.data.tasks, folder)

    def lines(self, run: Run, seeds: Sequence[int], points: dict[str, int]) -> None:
        """Train every seed of a run, and evaluate every pair of seeds along the line, for each merge method.

        Args:
            run: its own seed does not count.
            seeds: of the runs.
            points: of the curve, by merge method.
        """
        missing = []
        for pair, method in itertools.product(itertools.combinations(seeds, 2), points):
            record = self.line_file(run, pair, method)
            self.borrow(record, run)
            if not record.is_file():
                missing.append((pair, method))
        for seed in seeds:
            self.train(run.replace(seed=seed), any(seed in pair for pair, _ in missing))
        for pair, method in missing:
            self.line(run, pair, method, points[method])

    def line_file(self, run: Run, pair: Sequence[int], method: str) -> Path:
        """Where the line between two seeds of a run is kept."""
        return self.record_file(run, f"{method}-{run.settings_name}-seeds{pair[0]}-{pair[1]}")

    def line(
        self, run: Run, pair: Sequence[int], method: str, points: int, evaluator: AdapterEvaluator | None = None
    ) -> None:
        """Evaluate two seeds of a run along the line, and write its record.

        Args:
            run: its own seed does not count.
            pair: the two seeds; the first one's adapter has weight alpha.
            method: one of `copra_llm.merge.LINES`.
            points: of the curve.
            evaluator: of the run's model and test split; None: one for this line.
        """
        (task,) = run.config.data.tasks
        label = {} if run.variant is None else {"label": run.variant}
        curve = line_record(
            [self.adapter(run.replace(seed=seed)) for seed in pair],
            run.config,
            task,
            method=method,
            points=points,
            settings={"seeds": list(pair)} | label,
            evaluator=evaluator,
        )
        record = self.line_file(run, pair, method)
        write_result(record, portable(curve, run.variant))
        self.say(f"{record}: drop in the middle {curve.metrics[f'test/{task}/middle_drop']:.1f}")


def difference(result: Result, run: Run) -> str | None:
    """In which setting that matters a record is not of this run (nor of another seed of it); None: in none."""
    names = [
        portable_name(str(name)) for name in (result.config["model_name_or_path"], run.config.model.model_name_or_path)
    ]
    if names[0] != names[1]:
        return "model_name_or_path"
    recorded = DEFAULTS | result.config
    return next((k for k, value in run.config.flat().items() if k not in _FREE and recorded.get(k) != value), None)


def check_record(record: Path, result: Result, run: Run) -> None:
    """Refuse a record of the same name that is of other settings.

    Raises:
        InputError: naming the setting.
    """
    setting = difference(result, run)
    if setting is not None:
        raise InputError(f"{record} was made with another {setting} than the plan has; rename the plan's variant, or "
                         "give other --results")  # fmt: skip


def portable(result: Result, variant: str | None = None) -> Result:
    """A record without the folders of the machine it was made on, and with its variant's name, if it has one."""
    config = result.config | {"output_dir": None, "data_root": None}
    config["model_name_or_path"] = portable_name(config["model_name_or_path"])
    if config.get("init_adapter"):
        config["init_adapter"] = portable_name(config["init_adapter"])
    if variant is not None:
        config["variant"] = variant
    environment = result.environment | {"base_model": portable_name(result.environment["base_model"])}
    return dataclasses.replace(result, config=config, environment=environment)
