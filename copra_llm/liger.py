"""Which parts of a model run as Liger's fused kernels?

RMSNorm, rotary positions and the gated MLP: fewer passes over memory, the same numbers but for rounding. Not Liger's
fused loss: the output layer is already applied by chunks and at the trained tokens alone (`linear_loss`), and the
model is never given labels, where Liger's would act.

Source: Hsu et al., Liger Kernel (arXiv 2410.10989), by way of transformers' own integration.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from copra_llm.errors import InputError

LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""What Liger is told to leave alone. One of them replaces torch's own function for the whole process."""


def check_liger(device: torch.device) -> None:
    """Refuse `--use_liger_kernel` before anything is loaded, where it cannot work.

    Args:
        device: that the run computes on.

    Raises:
        InputError: without a GPU, or without the package.
    """
    if device.type in ("cpu", "mps"):
        raise InputError(f"--use_liger_kernel needs a GPU, but this run computes on {device.type}; leave it out")
    if importlib.util.find_spec("liger_kernel") is None:
        raise InputError("--use_liger_kernel needs liger-kernel: pip install copra_llm[liger]")


def apply_liger(model: nn.Module) -> None:
    """Put the kernels into a loaded model, whose adapter, if it has one, stays where it is.

    Raises:
        InputError: for a kind of model that Liger does not know; it would leave that as it is, without a word.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise InputError(f"--use_liger_kernel has no kernels for models of the type {kind}; leave it out")
    apply_liger_kernel(model, LOSSES)
