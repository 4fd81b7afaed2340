"""What has been evaluated already?

    {"game": {...}}                                              the first line: what the values are values of
    {"coalition": "101", "loss": 0.31, "accuracy": 90.0, "seconds": 1.2}         one line a coalition

Lines are appended as evaluations come in (loss in nats, accuracy in percent; numbers come back bit for bit).
So a run that was stopped at any moment goes on where it was and ends with the same numbers, and a second
metric or estimator on the same game starts from what is known.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from copra_llm.coalitions import METRICS, CoalitionGame
from copra_llm.errors import InputError
from copra_llm.quantised_base import quantised_as
from copra_llm.results import pack_bits, write_atomic


class Ledger:
    """The evaluations of one game, in a file.

    Args:
        path: the file; need not exist.
        game: what the values are values of, as JSON values.

    Raises:
        InputError: if the file is of another game, or is no ledger.
    """

    def __init__(self, path: Path, game: dict[str, Any]):
        self.path = Path(path)
        self.values: dict[str, dict[str, float]] = {}
        """`{"101": {"loss": nats, "accuracy": percent, "seconds": s}}`."""
        self._game = game
        if self.path.exists():
            self._read(game)

    def append(self, rows: dict[str, dict[str, float]]) -> None:
        """Keep evaluations, on disk when this returns. The first ones make the file."""
        if not self.path.exists():
            write_atomic(self.path, json.dumps({"game": self._game}) + "\n")
        with self.path.open("a", encoding="utf-8") as f:
            f.writelines(json.dumps({"coalition": key, **row}) + "\n" for key, row in rows.items())
            f.flush()
            os.fsync(f.fileno())
        self.values |= rows

    def _read(self, game: dict[str, Any]) -> None:
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]  # a kill may have torn the last line
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                if number == 1:
                    theirs = row["game"]
                else:
                    self.values[row["coalition"]] = {name: float(row[name]) for name in (*METRICS, "seconds")}
            except (ValueError, KeyError, TypeError):
                raise InputError(f"{self.path}, line {number} is no coalition's evaluation; remove the file") from None
        if not whole:
            raise InputError(f"{self.path} is no file of evaluations; remove it, or give another --output")
        ours = json.loads(json.dumps(game))
        differs = next((key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)), None)
        if differs is not None:
            raise InputError(
                f"{self.path} holds values of another game: {differs} is {_short(theirs.get(differs))} there and "
                f"{_short(ours.get(differs))} here; remove the file, or give another --output"
            )
        if len(whole) < len(text):
            with self.path.open("r+b") as f:
                f.truncate(len(whole))


class RecordedGame:
    """A game that looks a coalition up before it evaluates it: `game(coalitions (n, n_players)) -> values (n,)`.

    Args:
        game: what evaluates.
        ledger: what is known.
        metric: which of the two the values are; None: the game's.
        chunk: coalitions evaluated between two writes.
        done: called with a number of coalitions as they become known to the caller, for a progress bar.
    """

    def __init__(
        self,
        game: CoalitionGame,
        ledger: Ledger,
        metric: str | None = None,
        *,
        chunk: int = 8,
        done: Callable[[int], Any] = lambda n: None,
    ):
        self.game, self.ledger, self.metric = game, ledger, metric or game.metric
        self.chunk, self.done = chunk, done
        self._told: set[str] = set()

    @property
    def seconds(self) -> float:
        """Time of all evaluations asked for, those of earlier processes included."""
        return sum(self.ledger.values[key]["seconds"] for key in self._told)

    @property
    def n_players(self) -> int:
        return self.game.n_players

    def __call__(self, coalitions: np.ndarray) -> np.ndarray:
        coalitions = np.asarray(coalitions, dtype=bool)
        keys = [pack_bits(row) for row in coalitions]
        self._tell([key for key in keys if key in self.ledger.values])
        distinct = list({key: i for i, key in enumerate(keys) if key not in self.ledger.values}.values())
        missing = coalitions[distinct]
        # Neighbours in this order share most, so little is lost by stopping for a write after each chunk.
        missing = missing[self.game.order(missing)]
        for start in range(0, len(missing), self.chunk):
            part = missing[start : start + self.chunk]
            started = time.perf_counter()
            outcomes = self.game.outcomes(part)
            seconds = (time.perf_counter() - started) / len(part)
            losses, accuracies = -outcomes.values("loss"), outcomes.values("accuracy")
            rows = {
                pack_bits(row): {"loss": float(loss), "accuracy": float(accuracy), "seconds": seconds}
                for row, loss, accuracy in zip(part, losses, accuracies, strict=True)
            }
            self.ledger.append(rows)
            self._tell(list(rows))
        found = np.array([self.ledger.values[key][self.metric] for key in keys], dtype=float)
        return -found if self.metric == "loss" else found

    def _tell(self, keys: list[str]) -> None:
        fresh = set(keys) - self._told
        self._told |= fresh
        self.done(len(fresh))


def identity(game: CoalitionGame) -> dict[str, Any]:
    """What makes a game's values what they are, as JSON values: for the first line of its ledger."""
    examples = hashlib.sha256(repr((game.split.encoded, game.split.labels)).encode())
    bench = game.evaluator.bench
    held = quantised_as(bench.base.model)
    return {
        "base_model": bench.base.source.name,
        "base_fingerprint": bench.base.fingerprint,
        **({} if held is None else {"base_quantised": held}),
        "dtype": game.evaluator.config.model.dtype,
        "adapter": game.weights.fingerprint(),
        "task": game.split.task.name,
        "split": game.evaluator.split,
        "n_examples": len(game.split),
        "examples": examples.hexdigest()[:16],
        "players": game.players,
        "batch_size": game.batch_size,
        "pack": game.pack,
    }


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
