"""How is a base sharded over processes by FSDP2 while every process keeps the whole adapter?

Each transformer block's frozen weights are gathered for its forward and its backward pass, the rest (embeddings, norm,
output layer) for the whole model's. What is trained is left out of it: sharded, the rows of A and B (r of them, often
fewer than processes) would be padded, and gradients, optimizer and checkpoints would come in pieces.

Source: torch.distributed.fsdp.fully_shard; Zhao et al., PyTorch FSDP (arXiv 2304.11277).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn

from copra_llm.backends import Backend
from copra_llm.errors import InputError

T = TypeVar("T")

_QUANTISED = ("Params4bit", "Int8Params")
"""bitsandbytes' weights: what belongs to their bytes does not follow them into pieces."""


def fsdp_plugin(accelerator: Accelerator) -> FullyShardedDataParallelPlugin:
    """The launch's settings; on CPUs Accelerate reads them and goes on without them."""
    return getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()


def check_fsdp(plugin: FullyShardedDataParallelPlugin) -> None:
    """Refuse what a launch asks of FSDP and this loop cannot do.

    Raises:
        InputError: naming the setting of Accelerate's configuration.
    """
    if plugin.fsdp_version != 2:
        raise InputError(f"fsdp_version is {plugin.fsdp_version}, whose flattened parameters would move inactive "
                         "layers; set fsdp_version: 2 in Accelerate's configuration")  # fmt: skip
    if plugin.activation_checkpointing:
        raise InputError("fsdp_activation_checkpointing is true in Accelerate's configuration, but checkpointing is "
                         "this loop's --gradient_checkpointing; give that, and set the other to false")  # fmt: skip


def load_on_all() -> None:
    """Have every process read the base: what is asked of it before it is sharded needs the weights."""
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"


class ShardedBase(Backend):
    """FSDP2 for the frozen base; the rest as on processes that have all of it."""

    name = "fsdp2"

    def _placed(self, classifier: nn.Module) -> nn.Module:
        from torch.distributed.fsdp import fully_shard

        device, plugin = self.accelerator.device, fsdp_plugin(self.accelerator)
        # Mixed precision is autocast's here as on one process: the policy of FSDP would round the norms too.
        model = self.accelerator.prepare_model(classifier, device_placement=False, evaluation_mode=True)
        apart = {p for name, p in model.named_parameters() if _stays_whole(name, p)}
        for p in apart:
            p.data = p.data.to(device)
        options = {"ignored_params": apart, "reshard_after_forward": plugin.reshard_after_forward}
        if plugin.cpu_offload:
            options["offload_policy"] = plugin.cpu_offload
        for block in _blocks(model, plugin.transformer_cls_names_to_wrap):
            fully_shard(block, **options)
        # Gathered once a pass: what it holds is used at both ends.
        fully_shard(model, **options | {"reshard_after_forward": None})
        return model

    @contextmanager
    def whole(self, classifier: nn.Module, changed: bool = False) -> Iterator[nn.Module]:
        from torch.distributed.fsdp import FSDPModule

        # Whoever writes asks the model for its state, upon which it gives back what is gathered; were the others to
        # keep it, the next pass would gather on one process alone.
        for module in classifier.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        yield classifier

    def decode(self, classifier: nn.Module, action: Callable[[nn.Module], T]) -> T:
        # What the root holds is gathered by its hooks alone, and generating goes past its forward pass.
        from torch.distributed.fsdp import register_fsdp_forward_method

        classifier.beside = lambda: [action(classifier)]
        try:
            register_fsdp_forward_method(classifier, "beside")
            with torch.no_grad():
                return classifier.beside()[0]
        finally:
            del classifier.beside


def _stays_whole(name: str, p: nn.Parameter) -> bool:
    """What is trained, heads beside the model, and weights that cannot be cut."""
    return p.requires_grad or not name.startswith("model.") or type(p).__name__ in _QUANTISED


def _blocks(classifier: nn.Module, names: list[str] | None) -> list[nn.Module]:
    """The modules to shard one by one: of the named classes, or of those that transformers names for the model."""
    wanted = set(names or classifier.model.get_base_model()._no_split_modules or ())
    blocks = [module for module in classifier.model.modules() if type(module).__name__ in wanted]
    if not blocks:
        raise InputError(f"no module of the base is a {' or '.join(sorted(wanted)) or 'known block'}, so FSDP has "
                         "nothing to shard; name one in fsdp_transformer_layer_cls_to_wrap")  # fmt: skip
    return blocks
