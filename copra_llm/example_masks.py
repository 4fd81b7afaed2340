"""What if each example of a batch had a mask of its own, and not the whole step one?

    y_i = f(x_i; W_l + delta_il * Delta W_l),      delta_il ~ Bernoulli(p), for example i and layer l

An ablation of ours: a layer then has a gradient in nearly every step, from the examples that it takes part in, and is
spared the steps in which it would not move. What is saved with a mask a step is not saved here: a layer is left out
for the time of a step only if no example has it.

The output of B is multiplied with the mask, row by row, in PEFT's own forward pass; so a mask of ones is plain LoRA,
bit for bit. Masks are those of `masks.sample_masks`, numbered through a step's micro-batches.

Source: CopRA (arXiv 2410.22911), equation 2, with its delta drawn for each example as stochastic depth is in vision
models; it says once for each mini-batch (arXiv 1603.09382, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.gates import LayerGates
from copra_llm.images import asks_images
from copra_llm.masks import sample_masks


def check_example_masks(config: RunConfig, accelerator: Accelerator, tasks: list[str]) -> None:
    """Refuse `--mask_per example` before anything is loaded, where it cannot work.

    Raises:
        InputError: naming what it does not go with.
    """
    if accelerator.num_processes > 1 or accelerator.distributed_type == DistributedType.DEEPSPEED:
        against = "is for one process: layers that another one's examples train have no gradient here; leave it out"
    elif asks_images(config, tasks):
        against = "needs a row an example, but a class has one row for all of them in the text tower; leave it out"
    elif config.instruct is not None and config.instruct.packing:
        against = "needs a row an example, but --packing puts several into one; leave one of the two out"
    elif config.lora.use_dora:
        against = "is not for --use_dora, which scales the whole weight; leave one of the two out"
    elif config.train.torch_compile:
        against = "does not go with --torch_compile, which compiles one mask a step; leave one of the two out"
    else:
        return
    raise InputError(f"--mask_per example {against}")


class ExampleMasks:
    """The masks of a step's examples, if they are asked for; else each step has its one mask, and nothing happens here.

    Args:
        gates: the layers.
        asked: whether each example has a mask of its own.
        seed: mask seed.
        examples: of an optimizer step.
    """

    def __init__(self, gates: LayerGates, asked: bool, seed: int, examples: int):
        self.gates, self.asked, self.seed, self.examples = gates, asked, seed, examples
        self._masks, self._next = np.ones((examples, gates.num_layers), bool), 0

    def draw(self, mask: np.ndarray, p: Sequence[float], step: int) -> np.ndarray:
        """Which layers any example has, bool `(num_layers,)`; the step's own `mask` where none has its own."""
        if not self.asked:
            return mask
        self._masks, self._next = sample_masks(p, len(mask), self.examples, seed=self.seed, step=step), 0
        return self._masks.any(0)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The masks that were drawn last act inside; to be entered before the gates close what no example has."""
        with ExitStack() as stack:
            for layer in np.flatnonzero(~self._masks.all(0)):
                for module in self.gates.modules[layer]:
                    for name in module.active_adapters:
                        # What somebody watches by a hook the gates leave to PEFT's own forward.
                        handle = module.lora_B[name].register_forward_hook(_Rows(self, int(layer)))
                        stack.callback(handle.remove)
            yield

    def turn(self, rows: int) -> None:
        """The next `rows` examples of the step come."""
        if self.asked:
            self._now = torch.from_numpy(self._masks[self._next : self._next + rows])
            self._next += rows

    def now(self, device: torch.device) -> Tensor:
        """The masks of the examples whose turn it is, bool `(rows, num_layers)`; brought to the device once a turn."""
        self._now = self._now.to(device)
        return self._now


class _Rows:
    """Leaves a layer's update out of some rows of its output."""

    def __init__(self, masks: ExampleMasks, layer: int):
        self.masks, self.layer = masks, layer

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        mask = self.masks.now(output.device)[:, self.layer]
        if len(output) != len(mask):
            raise InputError(f"--mask_per example needs a row an example, but a layer got {len(output)} rows for "
                             f"{len(mask)} examples; leave it out")  # fmt: skip
        return output * mask.to(output.dtype).view(-1, *[1] * (output.dim() - 1))
