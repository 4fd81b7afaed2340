"""How good are many adapters, one after the other, on one loaded model?

The base model is loaded and the texts are tokenised once. Adapters of the shapes that are attached already
are swapped in place; others are attached anew to the same base. So a curve of 21 points costs 21 passes over
the data, whatever the merge rule does to ranks and targets.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import set_peft_model_state_dict
from torch import Tensor

from copra_llm.adapters import AdapterWeights, save_adapter_weights
from copra_llm.build import Workbench, build, fixed_head
from copra_llm.config import RunConfig
from copra_llm.evaluate import Evaluation, evaluate
from copra_llm.launch import evaluating
from copra_llm.models import load_adapter
from copra_llm.results import environment


class AdapterEvaluator:
    """Evaluates saved adapters on one split of some tasks.

    Args:
        config: model, data and batch size; its LoRA settings are not used.
        tasks: what can be asked for.
        split: "train", "dev" or "test".

    Nothing is loaded before the first adapter comes.
    """

    def __init__(self, config: RunConfig, tasks: list[str], split: str):
        self.config, self.tasks, self.split = config, tasks, split
        self._bench: Workbench | None = None
        self._attached: dict | None = None
        self._weights: AdapterWeights | None = None
        self._fixed_heads: dict[str, Tensor] = {}

    @property
    def accelerator(self) -> Accelerator:
        """Of the run's precision; made anew, since another run's may have come in between."""
        return evaluating(self.config.train)

    @property
    def bench(self) -> Workbench:
        """The model and data; there once an adapter has been evaluated."""
        if self._bench is None:
            raise ValueError("no adapter has been attached yet")
        return self._bench

    def __call__(self, weights: AdapterWeights, task: str) -> Evaluation:
        """Accuracy and loss of an adapter on a task, with every example's outcome.

        Raises:
            InputError: if the adapter does not fit the base model.
        """
        self.attach(weights)
        examples = self.bench.splits[self.split][task]
        return evaluate(self.accelerator, self.bench.classifier, examples, self.batch_size)

    def attach(self, weights: AdapterWeights) -> None:
        """Make `weights` the model's adapter, with the heads that belong to it."""
        if weights is self._weights:
            return
        self._weights = None
        shapes = {name: (f.lora_A.shape, f.lora_B.shape, f.scaling) for name, f in weights.factors.items()}
        shapes |= {name: tensor.shape for name, tensor in weights.extras.items()}
        if shapes == self._attached:
            set_peft_model_state_dict(self.bench.classifier.model, weights.state_dict())
        else:
            self._attached = None
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "adapter"
                save_adapter_weights(weights, folder)
                if self._bench is None:
                    self._bench = build(self.config, self.tasks, adapter=folder, splits=(self.split,))
                    self._fix_heads()
                else:
                    self._bench.classifier.model.unload()
                    self._bench.classifier.model = load_adapter(self._bench.base, folder)
            self._bench.classifier.to(self.accelerator.device)
            self._attached = shapes
        self._set_heads(weights)
        self._weights = weights

    @property
    def batch_size(self) -> int:
        return self.config.train.per_device_eval_batch_size

    def environment(self) -> dict:
        """What a record says of machine, libraries and base model."""
        return environment(
            device=self.accelerator.device.type, threads=torch.get_num_threads(), **self.bench.base.about()
        )

    def _fix_heads(self) -> None:
        """Make the heads of tasks that an adapter has none for; while the model is on the CPU, so to the bit those that
        runs were trained with."""
        base = self.bench.base
        if base.kind == "encoder":
            with self.bench.classifier.model.disable_adapter():
                self._fixed_heads = {t.name: fixed_head(base, t, self.config.data) for t in self.bench.tasks}

    def _set_heads(self, weights: AdapterWeights) -> None:
        """An encoder's heads: those saved with the adapter, for other tasks the fixed ones."""
        for name, fixed in self._fixed_heads.items():
            head = weights.heads.get(f"{name}.weight")
            self.bench.classifier.heads[name].data.copy_(fixed if head is None else head)
