"""How are many coalitions of a model's layers run for less than one forward pass each?

A transformer runs its blocks one after the other, so a block's output depends on its own gates and on those
of the blocks before it, and on no others. Coalitions put in order of their gates form a trie: two of them share
all hidden states below the first block in which they differ. A depth-first walk computes each node of the
trie once,

    blocks computed = number of distinct prefixes <= coalitions x blocks,

and keeps the outputs along one path alone: as many hidden states as there are blocks, whatever the number
of coalitions.

The model's own forward drives the walk. Each block's `forward` is replaced for that time by one that hands
out the output it already has, or runs the block with its gates set. So masks, positions and whatever else a
model gives its blocks are its own, and scoring that takes several passes (label words of several tokens after
a cached prompt, an encoder and a decoder) is shared alike: what a block writes into a key-value cache is
written again when the block is passed over.

Several coalitions can also stand side by side in one pass (`pack`); then a block runs once for all prefixes
in which its gates agree.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache

from copra_llm.gates import FIRST_INTEGER, LayerGates, base_name
from copra_llm.replaced import replaced_forward


class NotShareable(Exception):
    """The model's blocks cannot be run for several coalitions at once; the message says why."""


@dataclass(frozen=True)
class Block:
    """A transformer block and the gates inside it."""

    name: str
    module: nn.Module
    gates: list[int]
    """Indices into a mask."""


def find_blocks(model: nn.Module, gates: LayerGates) -> list[Block]:
    """The blocks that hold the gated modules, in the order of their names.

    Raises:
        NotShareable: if a gated module is in no numbered block.
    """
    modules = {base_name(name): module for name, module in model.named_modules()}
    names = {id(module): name for name, module in modules.items()}
    found: dict[str, set[int]] = {}
    for gate, members in enumerate(gates.modules):
        for member in members:
            match = re.search(FIRST_INTEGER, names[id(member)])
            if match is None:
                raise NotShareable(f"{names[id(member)]} is inside no numbered block")
            found.setdefault(match[0], set()).add(gate)
    return [Block(name, modules[name], sorted(inside)) for name, inside in found.items()]


def trie_order(masks: np.ndarray, blocks: list[Block]) -> np.ndarray:
    """The order `(n,)` in which `masks (n, gates)` are walked: neighbours share the longest prefixes."""
    columns = list(dict.fromkeys(gate for block in blocks for gate in block.gates))
    if not columns:
        return np.arange(len(masks))
    return np.lexsort(masks[:, columns[::-1]].T)


def prefix_ids(masks: np.ndarray, blocks: list[Block]) -> np.ndarray:
    """Which prefix each coalition has at each block: int `(blocks, n)`, equal where all gates so far are equal.

    `masks (n, gates)` must be in `trie_order`; ids count up from 0 at every block.
    """
    new = np.zeros(len(masks), dtype=int)
    ids = []
    for block in blocks:
        new[1:] |= (masks[1:, block.gates] != masks[:-1, block.gates]).any(1)
        ids.append(new.cumsum())
    return np.array(ids)


class SharedBlocks:
    """Runs a scoring function for many coalitions, each distinct prefix of blocks once.

    Args:
        model: the PEFT model, in evaluation mode.
        gates: its players.
        run: `batch -> scores (examples, labels)` through that model.
        probe: a small batch; a pass over it finds the order of the blocks.
        pack: coalitions side by side in one pass.
        apart: beginnings of the names of blocks that do not read the batch (a dual encoder's text tower). They are in
            no prefix: their gates are set for a whole pass, and the model itself knows what it has computed before.

    Raises:
        NotShareable: if a gated module is in no block that the pass calls.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: LayerGates,
        run: Callable[[dict], Tensor],
        probe: dict,
        pack: int = 1,
        apart: tuple[str, ...] = (),
    ):
        self.gates, self.run = gates, run
        self.computed = 0
        """Runs of a block for one batch and one prefix so far."""
        found = find_blocks(model, gates)
        by_name = [block for block in found if not block.name.startswith(apart)]
        self._apart = sorted({gate for block in found if block not in by_name for gate in block.gates})
        calls, alone = self._first_calls(by_name, probe)
        missing = [block.name for block in by_name if block.name not in calls]
        if missing:
            raise NotShareable(f"the forward pass does not call {missing[0]} as a module")
        self.blocks = sorted(by_name, key=lambda block: calls.index(block.name))
        self.pack = 1 if alone or self._apart else pack

    def order(self, masks: np.ndarray) -> np.ndarray:
        """`trie_order` of `masks (n, gates)`."""
        return trie_order(masks, self.blocks)

    def scores(self, batch: dict, masks: np.ndarray) -> list[Tensor]:
        """The scores `(examples, labels)` of a batch for each of `masks (n, gates)`, which must be in `order`."""
        walk, found = _Walk(self, masks), []
        examples = len(batch["labels"])
        with ExitStack() as stack:
            for place, block in enumerate(self.blocks):
                stack.enter_context(replaced_forward(block.module, walk.forward_of(place)))
            for first in range(0, len(masks), self.pack):
                here = slice(first, min(first + self.pack, len(masks)))
                walk.enter(here, examples)
                with self.gates.applied(self._outside_the_walk(masks[first])):
                    found += self.run(repeated(batch, here.stop - here.start)).split(examples)
        return found

    def _outside_the_walk(self, mask: np.ndarray) -> np.ndarray:
        """The gates of a coalition in the blocks apart; the others are open, for the walk closes them itself."""
        outside = np.ones_like(mask)
        outside[self._apart] = mask[self._apart]
        return outside

    def _first_calls(self, blocks: list[Block], probe: dict) -> tuple[list[str], bool]:
        """Names of blocks in the order of their first calls, and whether coalitions must be run one at a time.

        They must where a cache holds one coalition's keys and values, or an example has several rows.
        """
        calls, alone = [], []

        def recorder(block: Block) -> Callable:
            forward = block.module.forward

            def record(*args, **kwargs):
                calls.append(block.name)
                rows = next((len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), 0)
                alone.append(_cache_in(args, kwargs) is not None or rows != len(probe["labels"]))
                return forward(*args, **kwargs)

            return record

        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(replaced_forward(block.module, recorder(block)))
            self.run(dict(probe))
        return list(dict.fromkeys(calls)), any(alone)


class _Walk:
    """One batch of examples, taken through the trie of some coalitions."""

    def __init__(self, shared: SharedBlocks, masks: np.ndarray):
        self.shared, self.masks = shared, masks
        self.prefixes = prefix_ids(masks, shared.blocks)
        # By (block, number of the call in a pass): what the last coalition's block returned and wrote.
        self.held: dict[tuple[int, int], tuple[int, Any, list]] = {}

    def enter(self, here: slice, examples: int) -> None:
        """The next pass is that of the coalitions `here`."""
        self.here, self.examples = here, examples
        self.calls: Counter[int] = Counter()

    def forward_of(self, place: int) -> Callable:
        """What block `place` does instead of its own forward."""
        forward = self.shared.blocks[place].module.forward

        def walked(*args, **kwargs):
            key = place, self.calls[place]
            self.calls[place] += 1
            cache = _cache_in(args, kwargs)
            ids = self.prefixes[place, self.here]  # (pack,), increasing
            held_id, output, writes = self.held.get(key, (-1, None, []))
            if ids[-1] == held_id:  # and so all of them
                for written in writes:
                    cache.update(*written[0], **written[1])
                return _stacked([output] * len(ids))
            with _recorded_writes(cache) as writes:
                if len(ids) == 1:
                    pieces = {ids[0]: self._run(place, self.here.start, forward, args, kwargs)}
                else:
                    pieces = self._run_fresh(place, ids, held_id, forward, args, kwargs)
            if ids[0] == held_id:
                pieces[held_id] = output
            self.held[key] = ids[-1], pieces[ids[-1]], writes
            self.shared.computed += len(pieces) - (held_id in pieces)
            return _stacked([pieces[i] for i in ids])

        return walked

    def _run(self, place: int, coalition: int, forward: Callable, args, kwargs):
        """The block under the gates of a coalition."""
        inside = self.shared.blocks[place].gates
        mask = np.ones(self.shared.gates.num_layers, dtype=bool)
        mask[inside] = self.masks[coalition, inside]
        with self.shared.gates.applied(mask):
            return forward(*args, **kwargs)

    def _run_fresh(self, place: int, ids: np.ndarray, held_id: int, forward: Callable, args, kwargs) -> dict[int, Any]:
        """Outputs by prefix for those not held: one run for all whose gates in this block agree."""
        total = len(ids) * self.examples
        inside = self.shared.blocks[place].gates
        alike: dict[bytes, list[int]] = {}
        for at, i in enumerate(ids):
            if i != held_id and (at == 0 or ids[at - 1] != i):  # the first coalition of each prefix stands for it
                alike.setdefault(self.masks[self.here.start + at, inside].tobytes(), []).append(at)
        pieces = {}
        for places in alike.values():
            rows = torch.cat([torch.arange(at * self.examples, (at + 1) * self.examples) for at in places])
            own = [_map(lambda t, rows=rows: _rows_of(t, rows, total), value) for value in (args, kwargs)]
            output = self._run(place, self.here.start + places[0], forward, *own)
            for k, at in enumerate(places):
                span = slice(k * self.examples, (k + 1) * self.examples)
                pieces[ids[at]] = _map(lambda t, span=span: t[span], output)
        return pieces


def repeated(batch: dict, times: int) -> dict:
    """The batch, its examples `times` in a row; a new dictionary in any case."""
    if times == 1:
        return dict(batch)
    return {k: torch.cat([v] * times) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _rows_of(tensor: Tensor, rows: Tensor, total: int) -> Tensor:
    """The rows of what has one for each example; tables of positions and the like are left whole."""
    return tensor[rows.to(tensor.device)] if tensor.dim() > 1 and len(tensor) == total else tensor


def _stacked(outputs: list[Any]) -> Any:
    """Outputs of a block, below one another."""
    first = outputs[0]
    if len(outputs) == 1 or first is None:
        return first
    if isinstance(first, Tensor):
        return torch.cat(outputs)
    if type(first) in (tuple, list):
        return type(first)(_stacked(list(parts)) for parts in zip(*outputs, strict=True))
    raise NotShareable(f"a block returns a {type(first).__name__}, which cannot be joined for several coalitions")


def _map(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with the function applied to every tensor in its tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_map(function, entry) for entry in value)
    if type(value) is dict:
        return {key: _map(function, entry) for key, entry in value.items()}
    return value


def _cache_in(args: tuple, kwargs: dict) -> Cache | None:
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)


@contextmanager
def _recorded_writes(cache: Cache | None) -> Iterator[list]:
    """Yields the list of arguments with which `cache.update` is called."""
    writes: list = []
    if cache is None:
        yield writes
        return
    update = cache.update

    def record(*args, **kwargs):
        writes.append((args, kwargs))
        return update(*args, **kwargs)

    cache.update = record
    try:
        yield writes
    finally:
        del cache.update
