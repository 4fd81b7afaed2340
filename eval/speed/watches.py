"""What does a contender's step take: time, operations, bytes?

    Clock     CPU and wall seconds; of a GPU its own, between two events
    Counter   of products their floating-point operations; bytes saved for the backward pass; bytes that a step moves
              at least

At least moved are: each frozen weight that a product or norm reads, once forward and, where the gradient goes through
it, once backward; what is saved for the backward pass, written and read; of each adapter weight that the optimizer
steps ten numbers (it is read forward, backward and in the step, and written; its gradient is written and read; AdamW's
two moments are read and written). Activations between are left out: they may stay in a cache.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from copra_llm.plan.trace import operations

ADAMW_MOVES = 10
"""Numbers moved for each adapter weight in a step."""
EMBEDDING = torch.ops.aten.embedding


class Clock:
    """Seconds of `steps` steps, from the making of the first batch on.

    Args:
        steps: after so many the clock stands.
        device: "cpu" or "cuda".
    """

    def __init__(self, steps: int, device: str = "cpu"):
        self.left, self.cuda = steps, device == "cuda"
        self.seconds: dict[str, float] = {}
        """After the last step: "cpu" and "wall"; "gpu" where there is one."""
        self._began: dict[str, float] | None = None
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self.cuda else []

    def begin(self) -> None:
        if self._began is None:
            if self.cuda:
                torch.cuda.synchronize()
                self._events[0].record()
            self._began = _now()

    def step(self) -> None:
        self.left -= 1
        if self.left == 0:
            if self.cuda:
                self._events[1].record()
                torch.cuda.synchronize()
                self.seconds["gpu"] = self._events[0].elapsed_time(self._events[1]) / 1000.0
            self.seconds |= {key: end - self._began[key] for key, end in _now().items()}


def _now() -> dict[str, float]:
    return {"cpu": time.process_time(), "wall": time.perf_counter()}


@dataclass
class Counts:
    """Of one step, or the mean of several."""

    flops: float = 0.0
    """Floating-point operations of products, a multiplication and an addition being two."""
    saved_bytes: float = 0.0
    """Saved for the backward pass, model parameters and the batch left out."""
    least_bytes: float = 0.0
    """Moved at least; see the head of this file."""


class Counter(TorchDispatchMode):
    """Counts what a model's steps do; `with` it around them.

    Args:
        models: whose frozen parameters are known.
    """

    def __init__(self, models: Iterable[nn.Module]):
        super().__init__()
        self.steps: list[Counts] = []
        parameters = [p for model in models for p in model.parameters()]
        self._frozen = {_key(p): p.nbytes for p in parameters if not p.requires_grad}
        self._hooks = saved_tensors_hooks(self._save, lambda saved: saved)
        self._next()

    def __enter__(self):
        self._hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._hooks.__exit__(*error)

    def begin(self) -> None:
        """Nothing: a batch is no work of the model."""

    def step(self) -> None:
        saved = sum(size for size, _ in self._saved.values())
        weights = sum(min(uses, 2) * self._frozen[key] for key, uses in self._uses.items())
        moved = weights + self._rows + 2 * saved + ADAMW_MOVES * self._stepped
        self.steps.append(Counts(self._flops, saved, moved))
        self._next()

    def mean(self) -> Counts:
        """Over the steps."""
        n = len(self.steps)
        return Counts(*(sum(getattr(c, name) for c in self.steps) / n for name in Counts.__dataclass_fields__))

    def _next(self) -> None:
        self._flops = self._rows = self._stepped = 0
        self._uses: dict[int, int] = {}
        self._saved: dict[int, tuple[int, Tensor]] = {}

    def _save(self, t: Tensor) -> Tensor:
        # Whole numbers are the batch's. The tensor is held, or its address would be used again.
        parameter = _key(t) in self._frozen or isinstance(t if t._base is None else t._base, nn.Parameter)
        if not parameter and (t.is_floating_point() or t.dtype == torch.bool):
            self._saved.setdefault(_key(t), (t.untyped_storage().nbytes(), t))
        return t

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        operation = func._overloadpacket
        self._flops += operations(operation, args, kwargs, out)
        if operation == torch.ops.aten._fused_adamw_:
            self._stepped += sum(p.nbytes for p in args[0])
            return out
        given = {_key(t) for t in tree_iter(out) if isinstance(t, Tensor)}
        if operation == EMBEDDING:
            self._rows += out.nbytes
            return out
        for t in tree_iter((args, kwargs)):
            # A view reads nothing.
            if isinstance(t, Tensor) and (key := _key(t)) in self._frozen and key not in given:
                self._uses[key] = self._uses.get(key, 0) + 1
        return out


def _key(t: Tensor) -> int:
    """The same for all views of one storage."""
    return t.untyped_storage()._cdata
