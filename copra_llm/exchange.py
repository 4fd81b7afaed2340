"""What do the processes of a run tell each other of their gradients?

    g = (1 / P) sum_p g_p,     of the layers that are active in the step, and of what is always on

One flat all-reduce a step, after its last micro-batch. DDP's own reducer would send every element, and walk the graph
in each backward pass to find out which parameters had no part in it; here the mask says so, and every process knows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn

from copra_llm.gates import LayerGates


def share(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's tensors, bit for bit."""
    for tensor in tensors:
        distributed.broadcast(tensor, src=0)


class GradientExchange:
    """The mean of the processes' gradients.

    Args:
        accelerator: knows the processes.
        trained: the parameters that are trained, on the device, in one order on all processes.
        gates: whose layers the masks are about.
    """

    def __init__(self, accelerator: Accelerator, trained: Sequence[nn.Parameter], gates: LayerGates):
        self.processes, self.trained = accelerator.num_processes, list(trained)
        self._player_of = gates.player_of()
        self.bytes_sent = 0
        """What this process has put into the last step's all-reduce."""

    @property
    def bytes_of_all(self) -> int:
        """What DDP's reducer would put into those of a step: each element of every gradient."""
        return sum(p.numel() * p.element_size() for p in self.trained)

    def average(self, mask: Sequence[bool], flag: Tensor) -> Tensor:
        """Replace the gradients by their means over the processes.

        A parameter that had a part in the step on some processes only (the head of a task whose batch another one has)
        counts as zero on the others; one that had none anywhere keeps no gradient.

        Args:
            mask: active layers `(num_layers,)`, the same on every process.
            flag: a scalar that travels with them.

        Returns:
            The sum of `flag` over the processes.
        """
        if self.processes == 1:
            return flag
        sent = [p for p in self.trained if self._takes_part(p, mask)]
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in sent]
        there = own[0].new_tensor([p.grad is not None for p in sent])
        # Of unequal types torch takes one that the others fit into.
        flat = torch.cat([*(g.reshape(-1) for g in own), there, flag.to(own[0].dtype).reshape(1)])
        distributed.all_reduce(flat)
        self.bytes_sent = flat.numel() * flat.element_size()
        *means, there, flags = flat.split([*(p.numel() for p in sent), len(sent), 1])
        # What has a gradient here has one: only else the device has to be waited for.
        known = [p.grad is not None for p in sent]
        known = known if all(known) else [processes > 0 for processes in there.tolist()]
        for p, mean, found in zip(sent, means, known, strict=True):
            p.grad = mean.div_(self.processes).view_as(p).to(p.dtype) if found else None
        return flags[0].to(flag.dtype)

    def _takes_part(self, p: nn.Parameter, mask: Sequence[bool]) -> bool:
        player = self._player_of.get(id(p))
        return player is None or bool(mask[player])
