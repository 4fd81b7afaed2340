"""How far is a run, what has it logged, and how is that kept between its start and its end?"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from copra_llm.errors import InputError, shown
from copra_llm.json_file import is_count, is_number, read_json
from copra_llm.results import write_atomic

STATE = "state.json"
"""What a checkpoint holds beside the adapter and the optimizer's state: settings and progress."""


@dataclass
class Progress:
    """Where a run is, and what it has logged."""

    step: int = 0
    """Optimizer steps done."""
    log: list[dict[str, float]] = field(default_factory=list)
    """One entry every `logging_steps`: step, loss, learning_rate, grad_norm
    (of the last step, before clipping), activation_prob, active_layers."""
    dev: list[dict[str, float]] = field(default_factory=list)
    """One entry every `eval_steps`: step and the dev metrics."""
    samples: list[dict[str, Any]] = field(default_factory=list)
    """One entry an answer to `sample_prompts`: step, prompt and text."""
    skipped: int = 0
    """Steps left out because their loss was not finite."""
    unlogged: tuple[float, int] = (0.0, 0)
    """Sum and number of the losses since the last entry of the log."""
    seconds: float = 0.0
    """Time in the loop so far, evaluation and saving included."""
    examples_a_step: int | None = None
    """Examples of an optimizer step on all processes; None: of a checkpoint from before this was noted."""
    sent: tuple[int, int] = (0, 0)
    """Bytes that this process has put into the exchange of gradients, and the number of steps that were counted."""
    stream_batch_size: int | None = None
    """Examples of a micro-batch of the stream; that of the run's first start, whatever its batches are later."""


def write_state(folder: Path, settings: dict[str, Any], progress: Progress) -> None:
    """Write the settings, flat, and the progress made under them."""
    write_atomic(folder / STATE, json.dumps({"config": settings, **vars(progress)}))


def read_state(checkpoint: Path) -> tuple[dict[str, Any], Progress]:
    """The settings that a checkpoint was made under, and its progress.

    Raises:
        InputError: if the file cannot be read, or an entry is missing or of another kind than a run writes.
    """
    path, anew = checkpoint / STATE, "give another checkpoint, or start anew elsewhere"
    state = read_json(path, anew)
    state = state if isinstance(state, dict) else {}
    unknown = next((key for key in state if key not in _KINDS), None)
    if unknown is not None:
        raise InputError(f"{path} holds {shown(unknown)}, which no run writes there; {anew}")
    for key, (good, needed) in _KINDS.items():
        if (needed or key in state) and not good(state.get(key)):
            raise InputError(f"{path}: {key} is {shown(state.get(key))}, which no run writes there; {anew}")
    return state.pop("config"), Progress(**state)


def _is_positive(value: Any) -> bool:
    return is_count(value) and value > 0


def _is_entries(value: Any) -> bool:
    """Entries of a log: each has its step, and numbers."""
    return isinstance(value, list) and all(
        isinstance(entry, dict) and is_count(entry.get("step")) and all(map(is_number, entry.values()))
        for entry in value
    )


def _is_evaluations(value: Any) -> bool:
    return _is_entries(value) and all(any(key.endswith("/loss") for key in entry) for entry in value)


def _is_samples(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and is_count(entry.get("step"))
        and all(isinstance(entry.get(key), str) for key in ("prompt", "text"))
        for entry in value
    )


def _is_unlogged(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and is_number(value[0]) and is_count(value[1])


def _is_sent(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_count, value))


_KINDS = {
    "config": (lambda value: isinstance(value, dict), True),
    "step": (_is_positive, True),
    "log": (_is_entries, True),
    "dev": (_is_evaluations, True),
    "samples": (_is_samples, False),
    "skipped": (is_count, True),
    "unlogged": (_is_unlogged, True),
    "seconds": (lambda value: is_number(value) and 0 <= value < 1e12, True),
    "examples_a_step": (lambda value: value is None or _is_positive(value), False),
    "sent": (_is_sent, False),
    "stream_batch_size": (lambda value: value is None or _is_positive(value), False),
}
"""Entry of the file -> (what it may be, whether every checkpoint has it)."""
