"""Which parts of a model are compiled, and into how many graphs?

    block x {adapters open, closed} x {its input needs a gradient, or not}

Each transformer block is a region of its own. All blocks of a kind share its graphs, since weights are inputs of a
graph and no part of it; whether a gate is closed is seen from the classes of the block's modules, which are guarded. So
a mask chooses among four graphs a kind of block (as many again where batches without padding need no attention mask),
none of which computes or keeps anything for an adapter that is not there, or below the lowest active layer. Lengths are
symbols.

Evaluation runs the blocks as they are, and so gives the same numbers as it gives for the saved adapter later.

Source: torch.compile (Ansel et al., PyTorch 2, ASPLOS 2024); regional compilation as in PyTorch's recipes.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from copra_llm.config import RunConfig
from copra_llm.errors import InputError, nearest
from copra_llm.gates import base_name
from copra_llm.replaced import replaced_forward

MOST_GRAPHS = 64
"""Of one forward method: the kinds of blocks share it that are of one class (a dual encoder's towers, the first block
of T5 and the others). Beyond them a block would run as it is."""


def check_compile(config: RunConfig, device: torch.device) -> None:
    """Refuse `--torch_compile` before anything is loaded, where it cannot work.

    Args:
        config: of the run.
        device: that it computes on.

    Raises:
        InputError: for settings that it does not go with, an unknown backend, or a machine without a compiler.
    """
    backend, known = config.train.torch_compile_backend, torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise InputError(f'--torch_compile_backend is "{backend}"{nearest(backend, known)}, but must be one of '
                         f"{', '.join(known)}")  # fmt: skip
    if config.schedule.granularity != "layer":
        raise InputError("--torch_compile needs two graphs a block, but --granularity module has one for each choice "
                         "of its modules; leave one of the two out")  # fmt: skip
    if config.model.load_in_4bit or config.model.load_in_8bit:
        raise InputError("--torch_compile is not for a base in 4 or 8 bits, whose products are not compiled; leave "
                         "one of the two out")  # fmt: skip
    if config.schedule.rescale_active:
        raise InputError("--torch_compile has the layers' scalings as constants, but --rescale_active changes them in "
                         "every step; leave one of the two out")  # fmt: skip
    if config.lora.use_dora:
        raise InputError("--torch_compile is not for --use_dora, whose layers fall into pieces; leave one of the two "
                         "out")  # fmt: skip
    if backend == "inductor":
        _need_compiler(device)


def _need_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise InputError("--torch_compile needs triton on a GPU: pip install triton, or leave it out")
        return
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise InputError(f"--torch_compile needs a C++ compiler, but there is no {compiler}; install one, name it in "
                         "$CXX, or leave the flag out")  # fmt: skip


@contextmanager
def compiled_blocks(model: nn.Module, keys: Sequence[str], backend: str) -> Iterator[None]:
    """A model's blocks are compiled inside, in training mode; names, modules and hooks stay as they are.

    Args:
        model: with adapters.
        keys: names of its adapted blocks (`LayerGates.keys`); none: nothing is compiled.
        backend: of `torch.compile`.

    Raises:
        InputError: if a key names no block.
    """
    if not keys:
        yield
        return
    import torch._dynamo

    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=MOST_GRAPHS))
        for block in _blocks(model, keys):
            stack.enter_context(replaced_forward(block, _compiled_forward(block, backend)))
        yield


def _blocks(model: nn.Module, keys: Sequence[str]) -> list[nn.Module]:
    named = {base_name(name): module for name, module in model.named_modules()}
    missing = next((key for key in keys if key not in named), None)
    if missing is not None:
        raise InputError(f"--torch_compile needs blocks, but {missing} is none; leave out --layer_pattern")
    return [named[key] for key in keys]


def _compiled_forward(block: nn.Module, backend: str) -> Callable:
    """A block's forward pass, compiled where it trains."""
    # Of a dropout the same entries are left, which the backend's own generator would not do (and takes twice as long
    # for, on a CPU).
    options = {"fallback_random": True} if backend == "inductor" else None
    eager = block.forward
    compiled = torch.compile(_without_checkpointing(block), dynamic=True, backend=backend, options=options)

    @functools.wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not block.training:
            return eager(*args, **kwargs)
        if getattr(block, "gradient_checkpointing", False):
            # Around the region: inside, nothing that draws random numbers could be computed again.
            return block._gradient_checkpointing_func(functools.partial(compiled, **kwargs), *args)
        return compiled(*args, **kwargs)

    return forward


def _without_checkpointing(block: nn.Module) -> Callable:
    """A block's forward pass as its class has written it; transformers wraps it for activation checkpointing."""
    if isinstance(block, GradientCheckpointingLayer):
        return MethodType(type(block).forward.__wrapped__, block)
    return block.forward
