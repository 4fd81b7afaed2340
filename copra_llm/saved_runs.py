"""Which runs lie below a folder, and what are their adapters and settings?

A run is a folder with `adapter/`, beside it `config.yaml` (the settings), `result.json` (the record) and
`checkpoint-<step>/`. Nothing here touches a model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from copra_llm.adapter_files import CONFIG, RESULT, RUN_FOLDER
from copra_llm.adapters import AdapterWeights, adapter_folder, load_adapter_weights
from copra_llm.config import RunConfig, read_settings
from copra_llm.errors import InputError
from copra_llm.results import Result, read_result
from copra_llm.settings import WITHOUT_EFFECT

ADAPTER = RUN_FOLDER


@dataclass(frozen=True)
class SavedRun:
    """A saved adapter and what is known of how it was made."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    """The run's flat settings; empty where no `config.yaml` lies beside the adapter."""
    hub_id: str | None = None
    """What it was fetched by; None: it is a folder here."""

    @property
    def label(self) -> str:
        """The folder's name, with its parents' where that says only "adapter" or a task; the hub id, if it has one."""
        if self.hub_id is not None:
            return self.hub_id
        parts = [part for part in self.folder.parts[-3:] if part not in (ADAPTER, *self.settings.get("tasks", ()))]
        return parts[-1] if parts else str(self.folder)

    @property
    def config(self) -> RunConfig:
        return RunConfig.from_flat(self.settings)

    @cached_property
    def weights(self) -> AdapterWeights:
        return load_adapter_weights(self.folder)

    def record(self) -> Result | None:
        """The run's own record; None if there is none."""
        return read_result(self.folder / RESULT) if (self.folder / RESULT).is_file() else None

    def steps(self) -> int | None:
        """Optimizer steps of the whole run; None where neither record nor settings say."""
        record = self.record()
        if record is not None:
            return record.steps
        steps = self.settings.get("max_steps", -1)
        return steps if steps > 0 else None

    def checkpoint(self, fraction: float) -> Path | None:
        """The checkpoint at this fraction of the run, as `checkpoint_at` keeps it; None if there is none."""
        steps = self.steps()
        if steps is None:
            return None
        folder = checkpoint_folder(self.folder, step_at(fraction, steps))
        return folder if folder.is_dir() else None


def step_at(fraction: float, steps: int) -> int:
    """The optimizer step at a fraction of a run of `steps`: at least the first."""
    return max(1, round(fraction * steps))


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where a run keeps its state after an optimizer step."""
    return run / f"checkpoint-{step}"


NOT_FROM_OTHERS = {"trust_remote_code": False, "attn_implementation": None}
"""Settings that name code to run (an attention may be a kernel on the Hub), as they are where somebody else's say."""


def read_run(path: Path | str) -> SavedRun:
    """A run's folder, any folder that holds a PEFT adapter, or an adapter's hub id.

    Raises:
        InputError: if there is no adapter, or the settings cannot be read.
    """
    folder, own = Path(path), adapter_folder(path)
    hub_id = None if folder.exists() else str(path)
    if hub_id is not None:
        folder = own
    # What was fetched has its settings beside the adapter's files, a run one folder up.
    elif own == folder and not (folder / CONFIG).is_file() and (folder.parent / CONFIG).is_file():
        folder = folder.parent
    settings = {}
    if (folder / CONFIG).is_file():
        settings = RunConfig.from_flat(read_settings(folder / CONFIG)).flat()
        settings |= NOT_FROM_OTHERS if own == folder else {}
    return SavedRun(folder, settings, hub_id)


def find_runs(root: Path) -> list[SavedRun]:
    """Every finished run below a folder, in the order of their paths.

    Raises:
        InputError: if there is none.
    """
    root = Path(root)
    found = sorted(file.parent for file in root.rglob(CONFIG) if (file.parent / ADAPTER).is_dir())
    if not found:
        raise InputError(f"no run lies below {root}; give a folder that holds runs, each with {ADAPTER}/ and {CONFIG}")
    return [read_run(folder) for folder in found]


_FREE = WITHOUT_EFFECT | {"seed", "init_seed", "data_seed", "mask_seed", "checkpoint_at", "max_nonfinite_steps"}


def same_but_seed(first: SavedRun, second: SavedRun) -> bool:
    """Whether two runs have the same settings and other seeds."""
    if not first.settings or first.settings["seed"] == second.settings.get("seed"):
        return False
    return _kind(first) == _kind(second)


def _kind(run: SavedRun) -> str:
    """What repetitions of a run share: everything but seeds, and what an adapter does not depend on."""
    return repr(sorted((key, value) for key, value in run.settings.items() if key not in _FREE and value is not None))


def repeated_runs(folder: Path, seeds: Sequence[int]) -> list[list[SavedRun]]:
    """The runs right below a folder whose settings were trained with every one of the seeds.

    Runs that only tuned the settings, with one seed, are so left out.

    Returns:
        One list for each settings, its runs in the order of `seeds`.

    Raises:
        InputError: if no settings have them all.
    """
    kinds: dict[str, dict[int, SavedRun]] = {}
    for file in sorted(folder.glob(f"*/{CONFIG}")):
        if (file.parent / ADAPTER).is_dir():
            run = read_run(file.parent)
            kinds.setdefault(_kind(run), {})[run.settings["seed"]] = run
    found = [[runs[seed] for seed in seeds] for runs in kinds.values() if set(seeds) <= set(runs)]
    if not found:
        raise InputError(f"{folder} has no settings trained with each of the seeds {', '.join(map(str, seeds))}; "
                         "train them first, or give other --runs")  # fmt: skip
    return found


def best_on_dev(choices: Sequence[list[SavedRun]], task: str) -> list[SavedRun]:
    """Of lists of runs the one with the best mean dev accuracy, then the smallest mean dev loss.

    Raises:
        InputError: if there are several, and a run has no record to choose by.
    """
    if len(choices) == 1:
        return choices[0]

    def score(runs: list[SavedRun]) -> tuple[float, ...]:
        return tuple(np.mean([dev_score(read_result(run.folder / RESULT), task) for run in runs], axis=0))

    return max(choices, key=score)


def dev_score(result: Result, task: str) -> tuple[float, float]:
    """Dev accuracy, then smaller dev loss."""
    loss = result.metrics[f"dev/{task}/loss"]
    return result.metrics[f"dev/{task}/accuracy"], -math.inf if math.isnan(loss) else -loss
