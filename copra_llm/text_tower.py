"""How are the prompts of the classes encoded no more often than necessary?

The prompts of a data set are the same in every batch, so their features change only with what the adapters in the
text tower do. Three cases:

    nothing acts there (no adapter, or every gate closed)   the frozen features, computed once
    evaluation                                              computed once for each state of the adapters
    training                                                each step, from the lowest layer that acts upwards;
                                                            what the frozen layers below give is kept

What is kept is found again by what it depends on: the task, the adapters' state as `gates.Part.state` reads it at
that moment (gates, flags and the values of all factors), the frozen weights' addresses and versions, and the
precision. So nobody has to say when an adapter was exchanged, pruned, or gated by a coalition.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from copra_llm.gates import Part
from copra_llm.replaced import replaced_forward
from copra_llm.stochastic_depth import thinned

KEPT_BYTES = 2**28
"""Most bytes of features that are kept, and of hidden states below the lowest acting layer."""
AFTER_BLOCKS = ("text_projection", "text_model.head", "text_model.final_layer_norm")
"""Parts of a text tower that come after its blocks."""


class TextTower:
    """Features of the class prompts, by task.

    Args:
        part: the tower.
        encode: `task's name -> features (classes, dim)` through the model, with whatever adapters act.
    """

    def __init__(self, part: Part, encode: Callable[[str], Tensor]):
        self.part, self.encode = part, encode
        self.encoded = 0
        """Passes through the tower so far."""
        self._features: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._below: dict[Hashable, Any] = {}
        self._below_bytes = 0

    def features(self, task: str, training: bool) -> Tensor:
        """Features `(classes, dim)` under the adapters as they are now; with a gradient if they are trained.

        Args:
            task: whose prompts.
            training: whether dropout may act.
        """
        if (training or torch.is_grad_enabled()) and (found := self.part.acting()):
            return self._trained(task, found, training)
        state = self.part.state()
        if state is None:
            return self._counted(task)
        key = (task, state, *surroundings(self.part))
        if key not in self._features:
            with torch.no_grad(), _evaluating(self.part.named_modules().values()):
                self._features[key] = self._counted(task)
            while len(self._features) > 1 and sum(f.nbytes for f in self._features.values()) > KEPT_BYTES:
                self._features.popitem(last=False)
        self._features.move_to_end(key)
        return self._features[key]

    def _counted(self, task: str) -> Tensor:
        self.encoded += 1
        return self.encode(task)

    def _trained(self, task: str, found: Iterable[str], training: bool) -> Tensor:
        prefix, blocks = blocks_of(self.part)
        lowest = lowest_acting(found, prefix, len(blocks))
        below = nullcontext()
        if lowest > 0 and not (training and _drops_out(self.part)):
            below = self._from_kept((task, lowest, *surroundings(self.part)), blocks[:lowest])
        with below:
            return self._counted(task)

    @contextmanager
    def _from_kept(self, key: Hashable, frozen: list[nn.Module]) -> Iterator[None]:
        """`frozen` blocks give what the last of them gave before; the first time they run, and it is kept."""
        if key in self._below:
            # Each gives the last one's output: the next one does not look at it.
            with _all_forward(frozen, lambda *args, **kwargs: self._below[key]):
                yield
            return
        last, run = frozen[-1], frozen[-1].forward

        def kept(*args, **kwargs):
            output = run(*args, **kwargs)
            size = sum(t.nbytes for t in (output if isinstance(output, tuple) else (output,)) if t is not None)
            # Made in inference mode, it could not be saved for a later step's gradient.
            if self._below_bytes + size <= KEPT_BYTES and not torch.is_inference_mode_enabled():
                self._below[key] = output
                self._below_bytes += size
            return output

        with replaced_forward(last, kept):
            yield


def surroundings(part: Part) -> tuple[Hashable, ...]:
    """What a tower's output depends on besides its input and its adapters: frozen weights and precision."""
    frozen = tuple((p.data_ptr(), p._version) for p in part.frozen())
    device = next(p.device.type for module in part.named_modules().values() for p in module.parameters())
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return frozen, device, precision


def blocks_of(part: Part) -> tuple[str, list[nn.Module]]:
    """The tower's transformer blocks, and what stands before their number in their names."""
    for name, module in part.named_modules().items():
        if isinstance(module, nn.ModuleList) and len(module):
            return f"{name}.", list(module)
    return "", []


def lowest_acting(names: Iterable[str], prefix: str, num_blocks: int) -> int:
    """The first block in which one of the modules `names` is; what comes before the blocks counts as the first."""
    lowest = num_blocks
    for name in names:
        if prefix and name.startswith(prefix):
            lowest = min(lowest, int(name.removeprefix(prefix).split(".")[0]))
        elif not name.startswith(AFTER_BLOCKS):
            return 0
    return lowest


def _drops_out(part: Part) -> bool:
    """Whether the frozen tower itself is random while training."""
    for name, module in part.named_modules().items():
        if thinned(module):
            return True
        if isinstance(module, nn.Dropout) and module.p > 0 and ".lora_" not in name:
            return True
        if isinstance(getattr(module, "dropout", None), float) and module.dropout > 0:
            return True
    return False


@contextmanager
def _evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    before = [(module, module.training) for module in modules]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, was in before:
            module.training = was


@contextmanager
def _all_forward(modules: list[nn.Module], function: Callable) -> Iterator[None]:
    if not modules:
        yield
        return
    with replaced_forward(modules[0], function), _all_forward(modules[1:], function):
        yield
