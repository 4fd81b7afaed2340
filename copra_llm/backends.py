"""On how many processes, and how spread over them, is one adapter trained?

    one process                  forward, backward, step
    several, each with all       the same, and the active layers' gradients averaged in between (`exchange`)
    FSDP2                        the same; the frozen base is sharded, the adapter is not
    DeepSpeed ZeRO               its engine steps (`zero`)

The loop knows one interface, and what it trains is the same on all. The adapter is less than a hundredth of its base:
sharding the base saves nearly all there is to save, and a whole adapter on each process keeps gradients, optimizer and
checkpoints as they are on one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from copra_llm.exchange import GradientExchange, share
from copra_llm.gates import LayerGates
from copra_llm.optimizer import FiniteWatch, clip
from copra_llm.settings import TrainSettings

T = TypeVar("T")


class Backend:
    """Every process has the whole model.

    Args:
        accelerator: knows the processes.
        settings: of the run.
    """

    name = "ddp"
    """In records of several processes."""

    def __init__(self, accelerator: Accelerator, settings: TrainSettings):
        self.accelerator, self.settings = accelerator, settings

    def prepare(self, classifier: nn.Module, optimizer: Optimizer, gates: LayerGates) -> nn.Module:
        """Bring model and optimizer to the device; all processes start with the first one's adapter.

        Returns:
            The model to call from now on.
        """
        self.trained = [p for p in classifier.parameters() if p.requires_grad]
        prepared = self._placed(classifier)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.exchange = GradientExchange(self.accelerator, self.trained, gates)
        if self.accelerator.num_processes > 1:
            share(p.data for p in self.trained)
        return prepared

    def _placed(self, classifier: nn.Module) -> nn.Module:
        # For evaluation: without DDP's reducer.
        return self.accelerator.prepare_model(classifier, evaluation_mode=True)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradients, its share of the step's mean.

        Args:
            loss: its mean.
            last: whether it is the step's last one.
        """
        self.accelerator.backward(loss)

    def step(self, mask: Sequence[bool], watch: FiniteWatch) -> Tensor:
        """Average, clip, and step, unless a loss or a gradient was not finite.

        Args:
            mask: active layers `(num_layers,)`.
            watch: has seen this process's losses.

        Returns:
            The norm of all processes' mean gradient before clipping.
        """
        bad_losses = self.exchange.average(mask, watch.bad_losses)
        norm = clip(self.accelerator, self.trained, self.settings.max_grad_norm)
        found = watch.verdict(bad_losses, norm)
        if self.accelerator.scaler is None:
            self.optimizer.optimizer.found_inf = found
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def count(self, sent: tuple[int, int]) -> tuple[int, int]:
        """`Progress.sent` after one more step."""
        return (sent[0] + self.exchange.bytes_sent, sent[1] + 1) if self.accelerator.num_processes > 1 else sent

    def communication(self, sent: tuple[int, int]) -> dict[str, Any]:
        """For the record: gradient bytes that a process sends in a step, in the mean, and what DDP's reducer would
        send; `{}` of one process."""
        if self.accelerator.num_processes == 1:
            return {}
        measured = {"gradient_bytes_a_step": sent[0] / max(1, sent[1]), "of_ddp": self.exchange.bytes_of_all}
        return {"communication": {"backend": self.name, **measured}}

    def optimizer_state(self) -> dict:
        """The optimizer's `state_dict`, as one process has it; all processes ask."""
        return self.optimizer.state_dict()

    @contextmanager
    def whole(self, classifier: nn.Module, changed: bool = False) -> Iterator[nn.Module]:
        """The model with its whole adapter in its own tensors; all processes enter.

        Args:
            classifier: of `prepare`.
            changed: whether the block writes to them, on all processes alike.
        """
        yield self.accelerator.unwrap_model(classifier)

    def decode(self, classifier: nn.Module, action: Callable[[nn.Module], T]) -> T:
        """What `action` makes of the model beside its own forward pass: answers, say; all processes ask."""
        return action(self.accelerator.unwrap_model(classifier))
