"""Which runs lie below a folder, and what are their adapters and settings?

A run is a folder with `adapter/`, beside it `config.yaml` (the settings), `result.json` (the record) and
`checkpoint-<step>/`. Nothing here touches a model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from copra_llm.adapters import AdapterWeights, adapter_folder, load_adapter_weights
from copra_llm.config import RunConfig, read_settings
from copra_llm.errors import InputError
from copra_llm.results import Result, read_result

CONFIG, RESULT, ADAPTER = "config.yaml", "result.json", "adapter"


@dataclass(frozen=True)
class SavedRun:
    """A saved adapter and what is known of how it was made."""

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    """The run's flat settings; empty where no `config.yaml` lies beside the adapter."""

    @property
    def label(self) -> str:
        """The folder's name, with its parents' where that says only "adapter" or a task."""
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
        folder = self.folder / f"checkpoint-{max(1, round(fraction * steps))}"
        return folder if folder.is_dir() else None


def read_run(path: Path | str) -> SavedRun:
    """A run's folder, or any folder that holds a PEFT adapter.

    Raises:
        InputError: if there is no adapter, or the settings cannot be read.
    """
    folder = Path(path)
    if adapter_folder(folder) == folder and (folder.parent / CONFIG).is_file():
        folder = folder.parent
    settings = {}
    if (folder / CONFIG).is_file():
        settings = RunConfig.from_flat(read_settings(folder / CONFIG)).flat()
    return SavedRun(folder, settings)


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


FREE = {"seed", "init_seed", "data_seed", "mask_seed", "output_dir", "data_root", "resume_from_checkpoint",
        "checkpoint_at", "save_steps", "save_total_limit", "eval_steps", "logging_steps", "report_to", "metrics",
        "per_device_eval_batch_size", "max_eval_samples", "max_nonfinite_steps"}  # fmt: skip
"""Settings in which repetitions of a run may differ: seeds, and what an adapter does not depend on."""


def same_but_seed(first: SavedRun, second: SavedRun) -> bool:
    """Whether two runs have the same settings and other seeds."""
    if not first.settings or first.settings["seed"] == second.settings.get("seed"):
        return False
    names = (first.settings.keys() | second.settings.keys()) - FREE
    return all(first.settings.get(name) == second.settings.get(name) for name in names)
