"""What is a result, on disk?

One JSON file a run, written atomically, from which every table and plot is made:

    schema, protocol, created, config, metrics, seconds, peak_memory_bytes, steps, examples, environment

`metrics` is flat: `test/<task>/accuracy` in percent, `dev/<task>/loss` in nats. `data` holds what a plot
or an interval needs beyond that (a curve's points, the outcome of every example).
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from copra_llm.errors import InputError, shown
from copra_llm.json_file import read_json
from copra_llm.record_kinds import record_fault

SCHEMA = 1


@dataclass(frozen=True)
class Result:
    """One run's record. Times in seconds, memory in bytes."""

    protocol: str
    """What was run: "train", "interpolation", "merge", ..."""
    config: dict[str, Any]
    """The resolved settings; running them again repeats the run."""
    metrics: dict[str, float]
    """`<split>/<task>/accuracy` in percent, `<split>/<task>/loss` in nats, ..."""
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    """Peak resident memory of the process, or of the accelerator where there is one."""
    steps: int = 0
    """Optimizer steps."""
    examples: int = 0
    """Training examples seen."""
    data: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    schema: int = SCHEMA


def write_result(path: Path, result: Result) -> None:
    """Write the record atomically. A value that is not finite is stored as null: JSON has no NaN."""
    write_atomic(path, json.dumps(_finite(asdict(result)), indent=1, sort_keys=False) + "\n")


def read_result(path: Path) -> Result:
    """Read a record; a metric stored as null is NaN again.

    Raises:
        InputError: if the file is missing, is no record, or has a newer schema.
    """
    record = read_json(path, "give a result.json that a run has written")
    kinds = {"schema": int, "protocol": str, "config": dict, "metrics": dict}
    missing = [k for k, kind in kinds.items() if not (isinstance(record, dict) and isinstance(record.get(k), kind))]
    if missing:
        raise InputError(f"{path} is not a result record: it lacks {missing[0]}; give one that a run has written")
    if (wrong := record_fault(record)) is not None:
        raise InputError(
            f"{path}: {shown(wrong)} is not what a run writes there; run it again, or leave the record out"
        )
    if record["schema"] > SCHEMA:
        raise InputError(
            f"{path} has schema {shown(record['schema'])}, this version reads up to {SCHEMA}; update copra_llm"
        )
    record["metrics"] = {k: math.nan if value is None else value for k, value in record["metrics"].items()}
    known = Result.__dataclass_fields__
    return Result(**{key: value for key, value in record.items() if key in known})


def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"dir": path.parent, "prefix": f".{path.name}.", "delete": False}
    with naming(path), tempfile.NamedTemporaryFile("w", encoding="utf-8", **options) as f:
        try:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
            os.chmod(f.name, 0o644)
            os.replace(f.name, path)
        except BaseException:
            os.unlink(f.name)
            raise


@contextmanager
def atomic_folder(path: Path):
    """Yields an empty folder that becomes `path` (replacing it) when the block ends without an error.

    Its files are on the disk by then: after a loss of power a folder with its name would else hold empty ones.
    """
    import shutil

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming(path):
        fresh = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        os.chmod(fresh, 0o755)
        with naming(path):
            yield fresh
            _to_disk(fresh)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
            os.replace(path, old / "old")
            os.replace(fresh, path)
            shutil.rmtree(old)
        else:
            os.replace(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def naming(path: Path):
    """What the system refuses within the block is of `path` where it names no path, or the temporary one."""
    temporary = str(path.parent / f".{path.name}.")
    try:
        yield
    except OSError as error:
        if error.errno is not None and str(error.filename or temporary).startswith(temporary):
            error.filename = str(path)
        raise
    except Exception as error:
        # safetensors raises an error of its own kind, which has the system's number in its text alone.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def temporary_of(path: Path) -> str | None:
    """The name under which a temporary file or folder of the writers above would have appeared; None: it is none."""
    found = re.fullmatch(r"\.(.+)\.[a-z0-9_]{8}", path.name)
    return found[1] if found else None


def _to_disk(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)


def pack_bits(outcomes) -> str:
    """A row of outcomes as text, one 0 or 1 an example: small enough to keep in a record."""
    return "".join("1" if hit else "0" for hit in outcomes)


def unpack_bits(text: str) -> list[int]:
    """The inverse of `pack_bits`."""
    return [int(digit) for digit in text]


def environment(**more: Any) -> dict[str, Any]:
    """Library versions, machine and git commit; `more` adds what only the caller knows (device, base hash)."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("copra_llm", "torch", "transformers", "peft", "accelerate", "datasets"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "versions": versions,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "git_commit": _git_commit(),
        "backend": _backend(),
        **more,
    }


def peak_memory_bytes() -> int:
    """Peak memory of this process: of the CUDA device if one was used, else resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _backend() -> str:
    """What the process was launched with, as `accelerate launch` tells it: "ZeRO-2", "FSDP2", "DDP", "one process"."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return f"ZeRO-{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return "one process"
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return f"FSDP{os.environ.get('FSDP_VERSION', '1')}" if sharded else "DDP"


def _git_commit() -> str | None:
    """Commit of the checkout this package runs from; None if it is installed without one."""
    folder = Path(__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
