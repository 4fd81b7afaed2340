"""What does a training step keep of its forward pass?

Activations, unless they are to be computed again in the backward pass; but no keys and values for tokens to come.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from copra_llm.fused_linear import products_made_again


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute activations in the backward pass, without making autograd visit every layer.

    transformers lets the embedding's output require a gradient, which reentrant checkpointing alone needs:
    autograd would go below the lowest active layer.
    """
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()


@contextmanager
def kept_activations(model: nn.Module) -> Iterator[None]:
    """Within it a training step keeps no more than it needs: no cache, and no product that can be made again.

    Args:
        model: of transformers.
    """
    # A recomputed tensor can be asked for only once, so under checkpointing none is asked for twice.
    recomputed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    with no_cache_by_default(model), products_made_again(not recomputed):
        yield


@contextmanager
def no_cache_by_default(model: nn.Module) -> Iterator[None]:
    """Forward passes that do not ask for keys and values keep none; transformers' default is to copy and keep them.

    Args:
        model: of transformers.
    """
    # A vision tower, say, knows no such thing.
    configs = [c for c in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values()
               if getattr(c, "use_cache", False)]  # fmt: skip
    try:
        for config in configs:
            config.use_cache = False
        yield
    finally:
        for config in configs:
            config.use_cache = True
