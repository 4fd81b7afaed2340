"""Of which kinds are the entries of a result record?

Whoever counts, sorts or plots records relies on these; a record from elsewhere is held against them when it is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from copra_llm.json_file import is_count, is_integer, is_number, list_of


def record_fault(record: Mapping[str, Any]) -> str | None:
    """The dotted name of the first entry that is of another kind than a run writes; None: there is none.

    Args:
        record: as read from JSON; an entry that is absent is no fault here, nor is a setting that is null.
    """
    for key, good in _TOP.items():
        if key in record and not good(record[key]):
            return key
    for part, kinds in (("config", _CONFIG), ("data", _DATA), ("environment", _ENVIRONMENT)):
        own = record.get(part) or {}
        for key, good in kinds.items():
            # A setting may be null, what was measured may not.
            if key in own and not (own[key] is None and part != "data" or good(own[key])):
                return f"{part}.{key}"
    data = record.get("data") or {}
    outcomes = next((key for key in data if key.startswith("correct/") and not _is_bits(data[key])), None)
    if outcomes is not None:
        return f"data.{outcomes}"
    metrics = record.get("metrics") or {}
    wrong = next((name for name, value in metrics.items() if not _is_value(value)), None)
    return None if wrong is None else f"metrics.{wrong}"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 1000 and value.isprintable()


def _is_finite(value: Any) -> bool:
    # An integer may be beyond any float.
    return is_number(value) and abs(value) <= 1e300 and not math.isnan(value)


def _is_whole(value: Any) -> bool:
    return is_integer(value) and abs(value) <= 1 << 64


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_value(value: Any) -> bool:
    """A number, or null in place of one that is not finite."""
    return value is None or _is_finite(value)


def _is_bits(value: Any) -> bool:
    return isinstance(value, str) and set(value) <= {"0", "1"}


def _is_rectangle(value: Any) -> bool:
    """Values, or rows of them that are of one length."""
    return _NUMBERS(value) or (list_of(_NUMBERS)(value) and len({len(row) for row in value}) <= 1)


def _or_null(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or good(value)


def _has(**kinds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A table with these entries, each of its kind."""
    return lambda value: isinstance(value, dict) and all(good(value.get(key)) for key, good in kinds.items())


_NUMBERS = list_of(_is_value)
_TEXTS = list_of(_is_text)
_TOP = {"protocol": _is_text, "created": _is_text, "seconds": _is_finite, "peak_memory_bytes": is_count,
        "steps": is_count, "examples": is_count, "config": _is_table, "metrics": _is_table, "data": _is_table,
        "environment": _is_table}  # fmt: skip
_NAMED = ("method", "model_name_or_path", "split", "task", "merge_method", "checkpoint", "label", "on")
_CONFIG = {
    **dict.fromkeys(_NAMED, _is_text),
    **dict.fromkeys(("seed", "max_steps", "clients", "rounds", "lora_r"), _is_whole),
    "tasks": lambda value: bool(value) and _TEXTS(value),
    "seeds": list_of(_is_whole),
    "learning_rate": _is_finite,
}
_ENVIRONMENT = {
    **dict.fromkeys(("base_fingerprint", "base_model", "device", "python", "machine", "git_commit"), _is_text),
    "versions": lambda value: isinstance(value, dict) and all(v is None or _is_text(v) for v in value.values()),
}
_SERIES = (
    "values",
    "single",
    "merged",
    "single_loss",
    "merged_loss",
    "whole_accuracy",
    "whole_loss",
    "standard_errors",
)
_DATA = {
    **dict.fromkeys(_SERIES, _NUMBERS),
    "alpha": list_of(_is_finite),
    **dict.fromkeys(("x", "y"), lambda value: bool(value) and list_of(_is_finite)(value)),
    **dict.fromkeys(("accuracy", "loss"), _is_rectangle),
    **dict.fromkeys(("players", "layers"), _TEXTS),
    **dict.fromkeys(("log", "dev"), list_of(_is_table)),
    **dict.fromkeys(("v_empty", "v_full", "efficiency_gap"), _is_finite),
    "skipped_steps": is_count,
    "evaluations": lambda value: is_count(value) or _is_table(value),
    # Adapters that came without their run's record have neither.
    "points": list_of(_has(method=_or_null(_is_text), learning_rate=_is_value)),
    "early_distance": list_of(_has(method=_is_text, learning_rate=_is_finite, distance=_is_finite)),
    "rows": list_of(_has(kind=_is_text, name=_is_text, density=_is_finite, accuracy=_is_finite, loss=_is_value,
                          parameters=is_count, bytes=_is_finite, correct=_or_null(_is_bits))),
    "rounds": list_of(_has(round=is_count, merged=_has(accuracy=_is_finite, loss=_is_value))),
    "corners": lambda value: list_of(_has(x=_is_finite, y=_is_finite))(value) and len(value) == 3,
    "seconds_per_step": lambda value: _is_table(value) and all(map(list_of(_is_finite), value.values())),
    "steps": list_of(is_count),
    "correct": list_of(_is_bits),
    "cosine": _is_rectangle,
}  # fmt: skip
