"""Which optimizer takes the steps, and which of them does it leave out?

AdamW on the parameters of the adapter. A layer that is inactive in a step has no gradient, so nothing of it moves: no
weight, no moment, no step count. With LoRA+ the factors B have a larger learning rate than the factors A.

Source: Loshchilov and Hutter, AdamW (arXiv 1711.05101); Hayou et al., LoRA+ (arXiv 2402.12354).
"""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from copra_llm.errors import InputError
from copra_llm.progress import Progress
from copra_llm.settings import TrainSettings


def make_optimizer(classifier: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW on what is trained; fused, since the flag of `FiniteWatch` is for its kernel."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.loraplus_lr_ratio is None:
        trained = [p for p in classifier.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=rate, weight_decay=decay, fused=True)
    return create_loraplus_optimizer(
        classifier, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=settings.loraplus_lr_ratio,
        loraplus_weight_decay=decay, fused=True,
    )  # fmt: skip


class FiniteWatch:
    """Leaves out steps whose loss or gradient is not finite, without waiting for the device.

    The fused AdamW reads a flag tensor, `found_inf`, and leaves parameters, moments and step counts alone
    where it is 1. The flag stays on the device and is summed over processes; only `read`, at log steps,
    brings a count to the host. Under float16 the loss scaler does the same by itself.

    Args:
        device: of the flag.
        limit: of steps left out.
        progress: of the run; they are counted there.
    """

    def __init__(self, device: torch.device, limit: int, progress: Progress):
        self.limit, self.progress = limit, progress
        self.bad_losses = torch.zeros((), device=device)
        """Of the step so far; more than 0 once any process has had one."""
        self.bad_steps = torch.zeros((), device=device)

    def see(self, loss: torch.Tensor) -> None:
        """Note a micro-batch's loss on this process."""
        self.bad_losses += (~torch.isfinite(loss.detach())).float()

    def verdict(self, bad_losses: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Whether the step is left out, 0.0 or 1.0; it is counted, and the next one begins.

        Args:
            bad_losses: the sum over all processes of what they have seen.
            norm: of the gradient, the same on all processes.
        """
        found = ((bad_losses > 0) | ~torch.isfinite(norm)).float()
        self.bad_steps += found
        self.bad_losses = torch.zeros_like(self.bad_losses)
        return found

    def read(self, step: int) -> None:
        """Bring the count to the host.

        Raises:
            InputError: if it has reached the limit.
        """
        self.progress.skipped += int(self.bad_steps)
        self.bad_steps.zero_()
        if self.progress.skipped >= self.limit:
            raise InputError(
                f"by step {step} {self.progress.skipped} steps had a loss or gradient that was not finite; lower "
                "--learning_rate, or use --dtype float32"
            )


def clip(accelerator: Accelerator, trained: list, max_norm: float) -> torch.Tensor:
    """Clip the gradients in place and return their norm before; 0: only the norm."""
    # Inactive layers have no gradient at all: the norm is that of the active ones.
    norm = accelerator.clip_grad_norm_(trained, max_norm if max_norm > 0 else math.inf)
    return norm if isinstance(norm, torch.Tensor) else torch.tensor(float(norm), device=accelerator.device)
