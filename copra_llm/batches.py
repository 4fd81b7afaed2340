"""In which order are the examples read, and which go into one batch?

Training reads an endless stream: the epochs' permutations one after another, cut into windows of a few
batches; within a window examples of like length are put together, and the window's batches are shuffled.
Micro-batch i is a pure function of (data seed, i), so a resumed run needs no saved position, and every
batch is full. With several tasks the micro-batches take turns. A random view of an example (an image's crop) is a
function of the data seed and its place in the stream, whichever process makes it.

An optimizer step takes the next so many examples of the stream, dealt out in batches to the processes. A run that goes
on with more processes and smaller batches, or the other way round, keeps its stream and so every step's examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from copra_llm.errors import InputError
from copra_llm.settings import TrainSettings
from copra_llm.tasks.mtl15 import Example, Task

WINDOW = 16
"""Batches among which examples are sorted by length: the padding saved grows slowly beyond it."""


PASS_TOKENS = {"cpu": 64, "cuda": 2048}
"""What a forward pass costs beside its tokens, in tokens, by the kind of device. Measured on one CPU thread: a pass of
SmolLM2 over 4 tokens takes as long as 50 tokens in a batch of 512. On a GPU it is not measured: one is taken to be as
fast with 2048 tokens as with fewer."""


def window_batches(n: int, batch_size: int) -> int:
    """Batches in one window of a split of `n` examples: at most an epoch, or sorting would join an example's copies."""
    return max(1, min(WINDOW, n // batch_size))


Place = tuple[int, int, int]
"""Data seed, micro-batch, and position in it."""


class Views(Protocol):
    """Makes what a batch takes of an example that is not ready yet: an image, say, which has to be decoded."""

    workers: int
    """Processes in which views are made; 0: the one that trains."""

    def __call__(self, encoded: Any, place: Place | None) -> Any:
        """A random view of an example, a function of its place in the training stream; None: that for evaluation."""

    def prepare(self, encoded: list[Any]) -> None:
        """Called before processes are started that make views of these examples."""


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
    views: Views | None = None
    """None: a batch takes the examples as they are."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def scale(self) -> float:
        """What an example's summed loss is multiplied with, so that the mean over examples is the split's loss."""
        return 1.0 if self.targets is None else len(self) / float(self.targets.sum())

    def view(self, index: int, place: Place | None = None) -> Any:
        """What a batch takes of an example; training says where it stands."""
        return self.encoded[index] if self.views is None else self.views(self.encoded[index], place)

    def processes(self) -> int:
        """How many processes a loader should start for this split, which is prepared for them."""
        if self.views is None or self.views.workers == 0:
            return 0
        self.views.prepare(self.encoded)
        return self.views.workers


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


@dataclass(frozen=True)
class Ahead:
    """How batches are prepared before they are asked for."""

    workers: int = 0
    """Processes that do it; 0: the one that trains, when it asks."""
    pinned: bool = False
    """Whether in pinned memory, from which a GPU copies while it computes."""
    factor: int | None = None
    """Batches that each process is ahead; None: 2."""

    @classmethod
    def asked(cls, settings: TrainSettings, device: torch.device) -> Ahead:
        """As the settings want it; memory is pinned for a GPU alone."""
        pinned = settings.dataloader_pin_memory and device.type == "cuda"
        return cls(settings.dataloader_num_workers, pinned, settings.dataloader_prefetch_factor)


def train_loader(
    classifier,
    splits: list[EncodedSplit],
    stream: BatchStream,
    batch_size: int | None = None,
    ahead: Ahead | None = None,
) -> DataLoader:
    """The training stream as collated batches.

    Args:
        classifier: collates.
        splits: those of the stream.
        stream: micro-batches.
        batch_size: examples of a batch, where the stream is to be cut anew; None: as it is.
        ahead: how they are prepared; None: when they are asked for, or as the splits' views want it. Which batches
            there are, and what is in them, does not depend on it.

    Raises:
        InputError: if that would bring examples of several tasks into one batch.
    """
    batch_size = batch_size or stream.batch_size
    if len(splits) > 1 and stream.batch_size % batch_size:
        raise InputError(f"this run's tasks take turns by {stream.batch_size} examples, of which --per_device_train_"
                         f"batch_size {batch_size} is no part; give a divisor of {stream.batch_size}")  # fmt: skip

    def collate(rows: list[tuple[EncodedSplit, int, Any]]) -> dict:
        split = rows[0][0]
        return classifier.collate(split.task, [view for _, _, view in rows], [s.labels[i] for s, i, _ in rows])

    ahead = ahead or Ahead()
    workers = max(ahead.workers, *(split.processes() for split in splits))
    # An iterator draws a seed as it starts, by default from the global generator: that would move the dropout of a
    # run's first step, and of the first after resuming.
    return DataLoader(
        _Rows(splits, stream.seed),
        batch_sampler=_Dealt(stream, batch_size),
        collate_fn=collate,
        num_workers=workers,
        pin_memory=ahead.pinned,
        prefetch_factor=ahead.factor if workers else None,
        generator=torch.Generator(),
    )


def eval_batches(lengths: np.ndarray, batch_size: int, pass_tokens: int = PASS_TOKENS["cpu"]) -> list[np.ndarray]:
    """Every example once, longest first (so that memory runs out at once or not at all), in the cheapest batches.

    A batch costs its rows times its longest row, and `pass_tokens`; the sum is the least that batches of neighbours
    can have. Where all are of one length, only the last batch is not full.

    Args:
        lengths: tokens of each example `(n,)`.
        batch_size: most examples in a batch.
        pass_tokens: what a pass costs beside its tokens, in tokens.

    Returns:
        Indices of the examples of each batch.
    """
    order = np.argsort(-lengths, kind="stable")
    longest = lengths[order].astype(float)
    n = len(order)
    least, sizes = np.zeros(n + 1), np.zeros(n, dtype=int)
    for first in range(n - 1, -1, -1):  # the cheapest batches of what begins here
        size = np.arange(min(batch_size, n - first), 0, -1)
        costs = size * longest[first] + least[first + size]
        best = int(costs.argmin())
        least[first], sizes[first] = costs[best] + pass_tokens, size[best]
    batches, first = [], 0
    while first < n:
        batches.append(order[first : first + sizes[first]])
        first += sizes[first]
    return batches


def eval_loader(
    classifier, split: EncodedSplit, batch_size: int, *, device: str = "cpu", rank: int = 0, world: int = 1
) -> DataLoader:
    """The batches of `eval_batches`, collated, each with its examples' `index`.

    Args:
        classifier: collates.
        split: the examples.
        batch_size: most examples in a batch.
        device: kind of the device that takes them.
        rank, world: which of how many processes, which take turns. All have as many batches: where the last turn is
            not full, the last batch comes again.
    """
    batches = eval_batches(split.lengths, batch_size, PASS_TOKENS.get(device, PASS_TOKENS["cuda"]))
    own = [batches[min(turn + rank, len(batches) - 1)] for turn in range(0, len(batches), world)]

    def collate(rows: list[tuple[int, Any]]) -> dict:
        indices = [index for index, _ in rows]
        batch = classifier.collate(split.task, [view for _, view in rows], [split.labels[i] for i in indices])
        return {**batch, "index": torch.tensor(indices)}

    return DataLoader(
        _Indexed(split),
        batch_sampler=[batch.tolist() for batch in own],
        collate_fn=collate,
        num_workers=split.processes(),
        generator=torch.Generator(),  # as above
    )


class _Dealt(Sampler):
    """A stream's examples as (micro-batch, position, split, index), in batches of any size.

    Their numbers are those of the stream: which process reads them, and in which batch, does not matter.
    """

    def __init__(self, stream: BatchStream, batch_size: int):
        self.stream, self.batch_size, self.drop_last = stream, batch_size, stream.drop_last

    def __len__(self) -> int:
        return len(self.stream) * self.stream.batch_size // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int, int, int]]]:
        rows = []
        for micro_batch, batch in enumerate(self.stream, self.stream.start):
            rows += [(micro_batch, position, *key) for position, key in enumerate(batch)]
            while len(rows) >= self.batch_size:
                yield rows[: self.batch_size]
                del rows[: self.batch_size]


class _Rows:
    """Maps a numbered stream's items to what collate needs."""

    def __init__(self, splits: list[EncodedSplit], seed: int):
        self.splits, self.seed = splits, seed

    def __len__(self) -> int:
        return sum(map(len, self.splits))

    def __getitem__(self, key: tuple[int, int, int, int]) -> tuple[EncodedSplit, int, Any]:
        micro_batch, position, split, index = key
        return self.splits[split], index, self.splits[split].view(index, (self.seed, micro_batch, position))


class _Indexed:
    """A split's examples, each with its index and its view for evaluation."""

    def __init__(self, split: EncodedSplit):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.split.view(index)
