"""The order of the examples: `copra_llm.batches` (C1 for the data, and resume without a saved position)."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch

from copra_llm.batches import (
    WINDOW,
    BatchStream,
    EncodedSplit,
    encode_split,
    eval_batches,
    eval_loader,
    train_loader,
    window_batches,
)
from copra_llm.errors import InputError
from copra_llm.tasks.mtl15 import Example, get_task

GOLDEN_ONE = [[8, 4, 2], [7, 5, 6], [1, 9, 0], [3, 4, 2]]
GOLDEN_TWO = [[(1, 1), (1, 0)], [(0, 3), (0, 4)], [(1, 5), (1, 3)]]


def make_split(n: int, seed: int = 0) -> EncodedSplit:
    """A split of `n` examples with lengths 4 .. 60."""
    lengths = np.random.default_rng(seed).integers(4, 61, n)
    encoded = [[i] * int(k) for i, k in enumerate(lengths)]
    return EncodedSplit(get_task("sst2"), encoded, [i % 2 for i in range(n)], lengths)


def stream(*sizes: int, batch: int = 4, seed: int = 0, start: int = 0, stop: int = 3 * WINDOW) -> list:
    """The micro-batches start .. stop - 1 over splits of the given sizes."""
    return list(BatchStream([make_split(n) for n in sizes], batch, seed, start, stop))


def test_the_stream_is_a_function_of_its_seed():
    """Equal seeds give equal batches, other seeds others, and no global generator is read or moved."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    first = stream(50, seed=3)
    assert random.getstate() == before[0]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])
    np.random.seed(9), torch.manual_seed(9)
    assert stream(50, seed=3) == first
    assert stream(50, seed=4) != first


def test_golden_batches():
    """These batches are the same on every machine and version; a change would break every resumed run."""
    assert [[index for _, index in b] for b in stream(10, batch=3, seed=7, stop=4)] == GOLDEN_ONE
    assert stream(5, 6, batch=2, seed=1, start=15, stop=18) == GOLDEN_TWO


@pytest.mark.parametrize("n", [1, 3, 10, 64, 67, 1000])
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_epochs_follow_one_another(n: int, batch: int):
    """After any number of whole windows every example has been read equally often, to within one; batches are full."""
    batches, window = stream(n, batch=batch, stop=5 * WINDOW), window_batches(n, batch)
    assert all(len(b) == batch for b in batches)
    for done in range(window, 5 * WINDOW + 1, window):
        read = Counter(index for b in batches[:done] for _, index in b)
        each, over = divmod(done * batch, n)
        assert Counter(read[i] for i in range(n)) == Counter({each: n - over, each + 1: over}) - Counter()


def test_a_window_of_one_epoch_is_a_permutation():
    """Where a window is exactly an epoch long, each epoch holds every example once, in another order."""
    n = WINDOW * 4
    batches = stream(n, batch=4)
    epochs = [[i for b in batches[e * WINDOW : (e + 1) * WINDOW] for _, i in b] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("start", [1, 5, WINDOW - 1, WINDOW, 2 * WINDOW + 3])
@pytest.mark.parametrize("sizes", [(70,), (70, 11), (9, 50, 3)])
def test_a_stream_started_late_is_the_rest_of_the_whole(start: int, sizes: tuple[int, ...]):
    """Starting at micro-batch k gives what the stream from 0 gives after k."""
    late = BatchStream([make_split(n) for n in sizes], 4, 2, start, 4 * WINDOW)
    assert list(late) == stream(*sizes, seed=2, stop=4 * WINDOW)[start:]
    assert len(late) == 4 * WINDOW - start


@pytest.mark.parametrize(("n", "batch"), [(8, 4), (67, 4), (120, 16), (250, 16)])
def test_a_batch_of_a_small_split_is_no_heap_of_copies(n: int, batch: int):
    """Fewer examples than a window of batches: only where two epochs meet can a batch hold an example twice."""
    batches = stream(n, batch=batch, stop=200)
    copies = sum(batch - len(set(b)) for b in batches)
    assert all(max(Counter(b).values()) <= 2 for b in batches)
    assert copies < 0.2 * 200 * batch


def test_splits_take_turns():
    """With several tasks micro-batch i is of task i mod their number; each follows the stream it would alone."""
    batches = stream(30, 12, 7, stop=6 * WINDOW)
    assert all({split for split, _ in b} == {i % 3} for i, b in enumerate(batches))
    alone = [[i for _, i in b] for b in stream(30, stop=2 * WINDOW)]
    assert [[i for _, i in b] for b in batches[::3]] == alone


def test_data_and_masks_share_no_random_numbers():
    """With one seed for both, the streams of data and masks still read different Philox blocks."""
    from copra_llm.masks import _uniforms

    one = BatchStream([make_split(5), make_split(5)], 4, 0, 0, 1)
    raw = Counter(u for step in range(50) for u in _uniforms(16, 0, step).tolist())
    drawn = 50 * 16
    for split in (0, 1):
        for use in (1, 2):
            for index in range(50):
                raw.update(((one._rng(split, use, index).bit_generator.random_raw(16) >> 11) * 2.0**-53).tolist())
                drawn += 16
    assert len(raw) == drawn


def test_like_lengths_go_together():
    """Sorting within windows leaves less than a third of the padding that the same stream has unsorted."""
    split = make_split(1000)

    def padding(batches) -> int:
        return sum(int((split.lengths[b].max() - split.lengths[b]).sum()) for b in batches)

    batches = [[i for _, i in b] for b in BatchStream([split], 8, 0, 0, 10 * WINDOW)]
    flat = np.random.default_rng(0).permutation([i for b in batches for i in b])
    assert padding(batches) < padding(flat.reshape(-1, 8)) / 3


def test_long_batches_come_at_any_time():
    """A window's batches are shuffled: their lengths do not rise through it."""
    split = make_split(1000)
    longest = [max(split.lengths[i] for _, i in b) for b in BatchStream([split], 8, 0, 0, 6 * WINDOW)]
    windows = [longest[w * WINDOW : (w + 1) * WINDOW] for w in range(6)]
    assert all(w not in (sorted(w), sorted(w, reverse=True)) for w in windows)


class Echo:
    """A classifier that returns what it is given."""

    def encode(self, task, example):
        return list(example.fields["text"].encode())

    def collate(self, task, encoded, labels):
        return {"task": task.name, "encoded": encoded, "labels": torch.tensor(labels)}


def test_loaders_hand_over_the_right_rows():
    """Training batches hold the stream's examples with their labels; evaluation every example once, longest first."""
    texts = ["a", "bbbb", "cc", "ddddd", "eee"]
    split = encode_split(Echo(), get_task("sst2"), [Example({"text": t}, i % 2) for i, t in enumerate(texts)])
    assert split.lengths.tolist() == [1, 4, 2, 5, 3]
    rows = BatchStream([split], 2, 0, 0, 6)
    for batch, indices in zip(train_loader(Echo(), [split], rows), rows, strict=True):
        assert batch["encoded"] == [split.encoded[i] for _, i in indices]
        assert batch["labels"].tolist() == [split.labels[i] for _, i in indices]
    evaluated = list(eval_loader(Echo(), split, 2))
    assert [i for batch in evaluated for i in batch["index"].tolist()] == [3, 1, 4, 2, 0]
    assert all(b["encoded"] == [split.encoded[i] for i in b["index"]] for b in evaluated)
    assert all(b["labels"].tolist() == [split.labels[i] for i in b["index"]] for b in evaluated)


def cost(lengths: np.ndarray, batches: list[np.ndarray], pass_tokens: int) -> int:
    return sum(len(batch) * lengths[batch].max() + pass_tokens for batch in batches)


def cheapest(lengths: np.ndarray, batch_size: int, pass_tokens: int) -> int:
    """Of all ways to cut the examples in order of length, by trying each."""
    order, n = np.argsort(-lengths, kind="stable"), len(lengths)
    cuts = (np.flatnonzero([code >> i & 1 for i in range(n - 1)]) + 1 for code in range(2 ** (n - 1)))
    ways = (np.split(order, cut) for cut in cuts)
    return min(cost(lengths, way, pass_tokens) for way in ways if max(map(len, way)) <= batch_size)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("batch_size", "pass_tokens"), [(1, 64), (3, 0), (4, 20), (9, 64), (9, 2048)])
def test_batches_of_evaluation_are_the_cheapest(seed: int, batch_size: int, pass_tokens: int):
    """Every example once, longest first, no batch too large, and no other cut costs less."""
    lengths = np.random.default_rng(seed).integers(1, 100, 9)
    batches = eval_batches(lengths, batch_size, pass_tokens)
    assert sorted(np.concatenate(batches).tolist()) == list(range(9))
    assert (np.diff(lengths[np.concatenate(batches)]) <= 0).all() and max(map(len, batches)) <= batch_size
    assert cost(lengths, batches, pass_tokens) == cheapest(lengths, batch_size, pass_tokens)


def test_examples_of_one_length_fill_their_batches():
    """The fullest first, so that a device without the memory says so at once."""
    assert [len(batch) for batch in eval_batches(np.full(11, 7), 4)] == [4, 4, 3]


@pytest.mark.parametrize(("n", "world"), [(7, 2), (5, 3), (2, 4)])
def test_processes_share_the_batches_of_evaluation(n: int, world: int):
    """Together they have all of them, and each has as many: whoever shards a model waits in each."""
    split = make_split(n)
    loaders = [eval_loader(Echo(), split, 1, rank=rank, world=world) for rank in range(world)]
    seen = [[i for batch in loader for i in batch["index"].tolist()] for loader in loaders]
    assert {len(own) for own in seen} == {-(-n // world)}
    assert set(sum(seen, [])) == set(range(n))


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 8, 12])
def test_a_stream_cut_anew_has_the_same_examples_in_the_same_order(batch: int):
    """In batches of any size: the examples of the whole stream, each with the place it has there."""
    split = encode_split(Echo(), get_task("sst2"), [Example({"text": "a" * n}, 0) for n in range(1, 12)])
    stream = BatchStream([split], 4, 5, 3, 9)
    whole, cut = train_loader(Echo(), [split], stream), train_loader(Echo(), [split], stream, batch)
    assert len(cut) == 24 // batch and all(len(b["encoded"]) == batch for b in cut)
    assert [e for b in cut for e in b["encoded"]] == [e for b in whole for e in b["encoded"]]
    places = [[row[:2] for row in b] for b in cut.batch_sampler]
    assert sum(places, []) == [(micro_batch, i) for micro_batch in range(3, 9) for i in range(4)]


def test_tasks_are_not_mixed_in_a_batch():
    """A part of a task's batch is one task's; anything else is refused."""
    splits = [encode_split(Echo(), get_task(name), [Example({"text": "a"}, 0)] * 5) for name in ("sst2", "agnews")]
    stream = BatchStream(splits, 4, 0, 0, 6)
    tasks = [b["task"] for b in train_loader(Echo(), splits, stream, 2)]
    assert tasks == ["sst2", "sst2", "agnews", "agnews"] * 3
    with pytest.raises(InputError, match="take turns by 4 examples, of which --per_device_train_batch_size 8 is no"):
        train_loader(Echo(), splits, stream, 8)
