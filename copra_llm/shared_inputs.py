"""Which adapted layers take the same input, and how are they computed as one?

Queries, keys and values are three layers with one input; so are the two arms of a gated MLP. Which ones they are is
seen in one forward pass: layers that are called one after another with the very same tensor. From then on the first
call computes them all, and the others find their output ready. A layer that is called with anything else computes its
own: an output is handed out only for the tensor it was made from, as long as nobody has written to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from copra_llm.fused_linear import fused_forward, fused_together


class SharedInput:
    """Layers that took one input.

    Args:
        modules: in the order of their calls.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self.modules = list(modules)
        self._x: Tensor | None = None
        self._version = 0
        self._ready: dict[int, Tensor] = {}

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        """The output of one of the layers; that of the others is kept for their call."""
        if module is self.modules[0]:
            self._compute(x)
        known = x is self._x and x._version == self._version
        output = self._ready.pop(id(module), None) if known else None
        if not self._ready:
            self.forget()
        return fused_forward(module, x) if output is None else output

    def forget(self) -> None:
        """Let go of outputs that nobody has asked for."""
        self._x, self._ready = None, {}

    def _compute(self, x: Tensor) -> None:
        self.forget()
        # In inference mode tensors do not say when they are written to. What the layers are is asked each time: a mask
        # may leave some of them out, and somebody may have changed one since they were seen.
        fused = all(getattr(type(module), "is_fused", False) for module in self.modules)
        outputs = fused_together(self.modules, x) if fused and not x.is_inference() else None
        if outputs is None:
            return
        self._ready = {id(module): output for module, output in zip(self.modules, outputs, strict=True)}
        self._x, self._version = x, x._version


def shared_inputs(modules: Sequence[nn.Module], run: Callable[[], object]) -> list[SharedInput]:
    """Find the layers that take the same input.

    Args:
        modules: among these.
        run: a forward pass of the model they are in.
    """
    runs: list[list[nn.Module]] = []
    last: list[tuple[Tensor, int] | None] = [None]

    def see(module: nn.Module, args: tuple) -> None:
        # Held until the next call: another tensor at the same address is no other name of it.
        now = (args[0], 0 if args[0].is_inference() else args[0]._version) if args else None
        same = now is not None and last[0] is not None and now[0] is last[0][0] and now[1] == last[0][1]
        if same:
            runs[-1].append(module)
        else:
            runs.append([module])
        last[0] = now

    handles = [module.register_forward_pre_hook(see) for module in modules]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    found, known = [], set()
    for group in runs:
        # A layer that a pass calls twice belongs to where it was seen first.
        fresh = [module for module in dict.fromkeys(group) if id(module) not in known]
        known |= {id(module) for module in fresh}
        if len(fresh) > 1:
            found.append(SharedInput(fresh))
    return found
