"""`evaluate`: the same outcomes in batches of any size, also where memory does not suffice for the largest."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from copra_llm.batches import EncodedSplit
from copra_llm.classifiers import Grading
from copra_llm.evaluate import evaluate

LENGTHS = np.array([3, 9, 9, 4, 60, 5, 2, 7, 8, 8, 30])
TOO_MUCH = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Small(Grading, nn.Module):
    """Scores are a function of the example; a batch of more than `most` is one too many."""

    def __init__(self, most: int, message: str = TOO_MUCH):
        super().__init__()
        self.most, self.message, self.sizes = most, message, []

    def collate(self, task, encoded: list[int], labels: list[int]) -> dict:
        return {"values": torch.tensor(encoded), "labels": torch.tensor(labels), "task": task.name}

    def forward(self, batch: dict, scores: bool = False) -> torch.Tensor:
        self.sizes.append(len(batch["values"]))
        if len(batch["values"]) > self.most:
            raise torch.OutOfMemoryError(self.message)
        return torch.stack([torch.sin(batch["values"] * (k + 1.0)) for k in range(3)], dim=1)


@pytest.fixture
def split() -> EncodedSplit:
    n = len(LENGTHS)
    return EncodedSplit(SimpleNamespace(name="any"), list(range(n)), [i % 3 for i in range(n)], LENGTHS)


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 64])
def test_outcomes_are_those_of_each_example_in_its_place(accelerator, split, batch_size: int):
    """Whatever the batches: loss and answer of example i stand at i."""
    found = evaluate(accelerator, Small(64), split, batch_size)
    scores = torch.stack([torch.sin(torch.arange(len(split)) * (k + 1.0)) for k in range(3)], dim=1).double()
    expected = nn.functional.cross_entropy(scores, torch.tensor(split.labels), reduction="none")
    np.testing.assert_array_equal(found.nll, expected.numpy())
    np.testing.assert_array_equal(found.predicted, scores.argmax(1).numpy())
    np.testing.assert_array_equal(found.correct, found.predicted == np.array(split.labels))


def test_memory_that_does_not_suffice_halves_the_batch(accelerator, split):
    """Until all examples fit, by three at most; the mode of training comes back."""
    model = Small(3).train()
    found = evaluate(accelerator, model, split, 64)
    np.testing.assert_array_equal(found.nll, evaluate(accelerator, Small(64), split, 64).nll)
    last = max(i for i, size in enumerate(model.sizes) if size > 3)
    assert sum(model.sizes[last + 1 :]) == len(split) and model.training


def test_an_example_that_does_not_fit_alone_is_an_error(accelerator, split):
    """The device's own words, after a batch of one."""
    model = Small(0)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        evaluate(accelerator, model, split, 4)
    assert model.sizes[-1] == 1


def test_other_errors_are_not_tried_again(accelerator, split):
    """A fault of the model is raised at once."""
    model = Small(0, "the sizes of the tensors do not match")
    with pytest.raises(RuntimeError, match="do not match"):
        evaluate(accelerator, model, split, 4)
    assert len(model.sizes) == 1


def test_several_processes_do_not_try_again(split):
    """One alone would call for passes that the others do not make."""
    alone = SimpleNamespace(
        num_processes=2, process_index=0, device=torch.device("cpu"), unwrap_model=lambda model: model,
        autocast=Accelerator(cpu=True).autocast,
    )  # fmt: skip
    model = Small(0)
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(alone, model, split, 4)
    assert len(model.sizes) == 1
