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
from copra_llm.config import RunConfig
from copra_llm.interpolate import line_record
from copra_llm.portable import portable_name
from copra_llm.results import Result, read_result, write_result
from copra_llm.saved_runs import ADAPTER, checkpoint_folder
from copra_llm.train import train_adapter


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

    def folder(self, run: Run) -> Path:
        """The run's adapter and checkpoints."""
        return self.work / run.place / run.name

    def train(self, run: Run, adapter_wanted: bool = False) -> Result:
        """A run's record, from disk if it is there (with its adapter beside the work, where that is wanted)."""
        record = self.results / run.place / f"{run.name}.json"
        if not record.is_file() or (adapter_wanted and not (self.folder(run) / ADAPTER).is_dir()):
            result = self._train(run)
            write_result(record, portable(result, run.variant))
            task = run.config.data.tasks[0]
            self.say(f"{record}: dev {result.metrics[f'dev/{task}/accuracy']:.1f} in {result.seconds:.0f} s")
        return read_result(record)

    def adapter(self, run: Run) -> AdapterWeights:
        """A run's adapter; trained, without a record among the results, if it is not there."""
        folder = self.folder(run)
        if not (folder / ADAPTER).is_dir():
            self.say(f"{folder}: no adapter there, training one")
            self._train(run)
        return load_adapter_weights(folder)

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
        task = run.config.data.tasks[0]
        missing = {}
        for pair, method in itertools.product(itertools.combinations(seeds, 2), points):
            name = f"{method}-{run.settings_name}-seeds{pair[0]}-{pair[1]}.json"
            record = self.results / run.place / name
            if not record.is_file():
                missing[pair, method] = record
        for seed in seeds:
            self.train(run.replace(seed=seed), any(seed in pair for pair, _ in missing))
        for (pair, method), record in missing.items():
            label = {} if run.variant is None else {"label": run.variant}
            curve = line_record(
                [self.adapter(run.replace(seed=seed)) for seed in pair],
                run.config,
                task,
                method=method,
                points=points[method],
                settings={"seeds": list(pair)} | label,
            )
            write_result(record, portable(curve, run.variant))
            self.say(f"{record}: drop in the middle {curve.metrics[f'test/{task}/middle_drop']:.1f}")


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
