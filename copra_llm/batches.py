"""In which order are the examples read, and which go into one batch?

Training reads an endless stream: the epochs' permutations one after another, cut into windows of a few
batches; within a window examples of like length are put together, and the window's batches are shuffled.
Micro-batch i is a pure function of (data seed, i), so a resumed run needs no saved position, and every
batch is full. With several tasks the micro-batches take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from copra_llm.tasks.mtl15 import Example, Task

WINDOW = 16
"""Batches among which examples are sorted by length: the padding saved grows slowly beyond it."""


def window_batches(n: int, batch_size: int) -> int:
    """Batches in one window of a split of `n` examples: at most an epoch, or sorting would join an example's copies."""
    return max(1, min(WINDOW, n // batch_size))


@dataclass(frozen=True)
class EncodedSplit:
    """One split of one task, tokenised."""

    task: Any
    """What has the task's name."""
    encoded: list[Any]
    labels: list[int]
    lengths: np.ndarray
    """Tokens of each example `(n,)`."""
    targets: np.ndarray | None = None
    """Trained tokens of each example `(n,)`, where the loss is a mean over tokens and not over examples."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def scale(self) -> float:
        """What an example's summed loss is multiplied with, so that the mean over examples is the split's loss."""
        return 1.0 if self.targets is None else len(self) / float(self.targets.sum())


def encode_split(classifier, task: Task, examples: list[Example]) -> EncodedSplit:
    """Tokenise a split once for the whole run."""
    encoded = [classifier.encode(task, example) for example in examples]
    lengths = np.array([len(e["input_ids"] if isinstance(e, dict) else e) for e in encoded])
    return EncodedSplit(task, encoded, [example.label for example in examples], lengths)


class BatchStream(Sampler):
    """Micro-batches `start .. stop - 1` of the endless training stream, as lists of (split, index)."""

    def __init__(self, splits: list[EncodedSplit], batch_size: int, seed: int, start: int, stop: int):
        self.splits, self.batch_size, self.seed = splits, batch_size, seed
        self.start, self.stop = start, stop
        self.drop_last = False

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        windows: dict[tuple[int, int], list[np.ndarray]] = {}
        for i in range(self.start, self.stop):
            split, own = i % len(self.splits), i // len(self.splits)
            window, place = divmod(own, window_batches(len(self.splits[split]), self.batch_size))
            if (split, window) not in windows:
                windows = {key: value for key, value in windows.items() if key[0] != split}
                windows[split, window] = self.window(split, window)
            yield [(split, int(index)) for index in windows[split, window][place]]

    def window(self, split: int, window: int) -> list[np.ndarray]:
        """The batches of one window of one split's stream."""
        n = len(self.splits[split])
        batches = window_batches(n, self.batch_size)
        size = batches * self.batch_size
        first, last = window * size, (window + 1) * size - 1
        epochs = [self._rng(split, 1, e).permutation(n) for e in range(first // n, last // n + 1)]
        offset = first - (first // n) * n
        examples = np.concatenate(epochs)[offset : offset + size]
        by_length = examples[np.argsort(self.splits[split].lengths[examples], kind="stable")]
        order = self._rng(split, 2, window).permutation(batches)
        return [by_length[b * self.batch_size : (b + 1) * self.batch_size] for b in order]

    def _rng(self, split: int, use: int, index: int) -> np.random.Generator:
        # The masks have counter word 2 = 0: with equal seeds the streams still differ.
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[0, index, use, split]))


def train_loader(classifier, splits: list[EncodedSplit], stream: BatchStream) -> DataLoader:
    """The training stream as collated batches."""

    def collate(rows: list[tuple[EncodedSplit, int]]) -> dict:
        split = rows[0][0]
        return classifier.collate(split.task, [s.encoded[i] for s, i in rows], [s.labels[i] for s, i in rows])

    # An iterator draws a seed as it starts, by default from the global generator: that would move the dropout of a
    # run's first step, and of the first after resuming.
    return DataLoader(_Rows(splits), batch_sampler=stream, collate_fn=collate, generator=torch.Generator())


def eval_loader(classifier, split: EncodedSplit, batch_size: int) -> DataLoader:
    """Every example once, longest first (so that memory runs out at once or not at all), with its `index`."""
    order = np.argsort(-split.lengths, kind="stable")

    def collate(indices: list[int]) -> dict:
        batch = classifier.collate(split.task, [split.encoded[i] for i in indices], [split.labels[i] for i in indices])
        return {**batch, "index": torch.tensor(indices)}

    return DataLoader([int(i) for i in order], batch_size=batch_size, collate_fn=collate)


class _Rows:
    """Maps a stream's (split, index) to what collate needs."""

    def __init__(self, splits: list[EncodedSplit]):
        self.splits = splits

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    def __getitem__(self, key: tuple[int, int]) -> tuple[EncodedSplit, int]:
        return self.splits[key[0]], key[1]
