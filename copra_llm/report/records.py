"""Which records are there, each once, and do they hold what their protocol promises?"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from copra_llm.errors import InputError
from copra_llm.results import Result, read_result

NO_RECORDS = ("adapter_config.json", "state.json", "manifest.json")
"""JSON files that lie in a run's folder and are something else."""

_RUN = ("config.method", "config.model_name_or_path")
NEEDED: dict[str, tuple[str, ...]] = {
    "train": (*_RUN, "config.tasks", "config.learning_rate"),
    "evaluate": ("config.split", "config.task"),
    "speed_step": ("config.model", "config.precision", "config.device", "metrics.seconds_per_step/base"),
    "interpolation": (*_RUN, "config.split", "config.task", "config.merge_method", "data.alpha", "data.accuracy",
                      "data.loss", "data.correct"),
    "layerwise": (*_RUN, "config.split", "config.task", "data.layers", "data.alpha", "data.accuracy", "data.loss"),
    "plane": (*_RUN, "config.split", "config.task", "data.x", "data.y", "data.accuracy", "data.loss", "data.corners"),
    "pruning": (*_RUN, "config.split", "config.task", "data.rows"),
    "shapley": (*_RUN, "config.split", "config.task", "data.players", "data.values"),
    "federated": (*_RUN, "config.task", "config.clients", "config.merge_method", "data.rounds"),
    "multitask": (*_RUN, "config.tasks", "config.merge_method"),
    "merge_over_steps": (*_RUN, "config.task", "data.steps", "data.single", "data.merged"),
    "similarity": ("config.model_name_or_path", "data.points", "data.cosine"),
}  # fmt: skip
"""What the page needs of a record, by protocol."""

MATCHING: dict[str, tuple[tuple[str, str], ...]] = {
    "interpolation": (("alpha", "accuracy"), ("alpha", "loss"), ("alpha", "correct")),
    "layerwise": (("layers", "accuracy"), ("layers", "loss")),
    "plane": (("y", "accuracy"), ("y", "loss")),
    "shapley": (("players", "values"),),
    "merge_over_steps": (("steps", "single"), ("steps", "merged")),
    "similarity": (("points", "cosine"),),
}
"""Lists of a record's data that must be of one length."""

ROWS_MATCHING: dict[str, tuple[tuple[str, str], ...]] = {
    "layerwise": (("alpha", "accuracy"), ("alpha", "loss")),
    "plane": (("x", "accuracy"), ("x", "loss")),
}
"""Lists of a record's data, and lists of rows that must each have its length."""


@dataclasses.dataclass(frozen=True)
class Found:
    """All records, and how many files were another copy of one of them."""

    results: list[Result]
    copies: int = 0
    other_names: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)
    """By model: what else records of the same base weights call it."""


def find_results(paths: Iterable[Path]) -> list[Result]:
    """Every record among the files and below the folders.

    Raises:
        InputError: if there is none, or a named file is none.
    """
    return [result for _, result in _read(paths)]


def find_records(paths: Sequence[Path]) -> Found:
    """Every record once: a copy of a run is no other seed.

    Raises:
        InputError: if there is none, a file is none, or one lacks what its protocol promises.
    """
    results, known, copies = [], set(), 0
    for path, result in _read(paths):
        check(result, path)
        content = json.dumps(dataclasses.asdict(result), sort_keys=True)
        copies += content in known
        if content not in known:
            results.append(result)
        known.add(content)
    named, other_names = one_name_a_model(results)
    return Found(named, copies, other_names)


def one_name_a_model(results: Sequence[Result]) -> tuple[list[Result], dict[str, list[str]]]:
    """Records in which a model has one name, the shortest in use; and what else it was called.

    A packaged model goes by its short name or its hub id. The hash of the weights says that they are one.
    """
    names: dict[str, set[str]] = {}
    for r in results:
        if r.environment.get("base_fingerprint") and "model_name_or_path" in r.config:
            names.setdefault(r.environment["base_fingerprint"], set()).add(str(r.config["model_name_or_path"]))
    short = {weights: min(known, key=lambda name: (len(name), name)) for weights, known in names.items()}
    named = [
        dataclasses.replace(r, config=r.config | {"model_name_or_path": short[weights]})
        if (weights := r.environment.get("base_fingerprint")) in short and "model_name_or_path" in r.config
        else r
        for r in results
    ]
    others = {short[weights]: sorted(known - {short[weights]}) for weights, known in names.items() if len(known) > 1}
    return named, others


def check(result: Result, path: Path) -> None:
    """Hold a record against its protocol; an unknown protocol promises nothing.

    Raises:
        InputError: if something is missing or lists do not match.
    """
    for name in NEEDED.get(result.protocol, ()):
        part, key = name.split(".", 1)
        if _get(getattr(result, part), key) is None:
            raise InputError(
                f"{path}: a record of protocol {result.protocol} lacks {name}; run it again, or leave it out"
            )
    for first, second in MATCHING.get(result.protocol, ()):
        lengths = len(result.data[first]), len(result.data[second])
        if lengths[0] != lengths[1]:
            raise InputError(
                f"{path}: data.{first} has {lengths[0]} entries, data.{second} {lengths[1]}; "
                "they must match, so run it again, or leave it out"
            )
    for first, second in ROWS_MATCHING.get(result.protocol, ()):
        wanted = len(result.data[first])
        if not all(isinstance(row, list) and len(row) == wanted for row in result.data[second]):
            raise InputError(
                f"{path}: data.{first} has {wanted} entries, so each row of data.{second} must have as many; run it "
                "again, or leave it out"
            )


def _get(part: Mapping[str, Any], key: str) -> Any:
    return part.get(key) if isinstance(part, Mapping) else None


def _read(paths: Iterable[Path]) -> list[tuple[Path, Result]]:
    found: dict[Path, tuple[Path, Result]] = {}
    paths = list(map(Path, paths))
    for path in paths:
        files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
        for file in files:
            if file.resolve() not in found and not (path.is_dir() and file.name in NO_RECORDS):
                found[file.resolve()] = (file, read_result(file))
    if not found:
        raise InputError(f"no result record below {', '.join(map(str, paths))}; give result.json files or folders")
    return list(found.values())
