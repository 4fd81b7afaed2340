"""Liger's kernels: refused where they cannot run; elsewhere asked for as transformers does, without its losses.

No GPU is needed: a small fake stands for the package and says what it was told. The kernels themselves are not run.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from transformers.integrations import liger as integration

from copra_llm import liger, train
from copra_llm.config import RunConfig
from copra_llm.errors import InputError
from copra_llm.liger import apply_liger, check_liger
from copra_llm.models import add_adapter, load_base
from copra_llm.settings import LoraSettings, ModelSettings
from copra_llm.train import train_adapter

BASE = {"tasks": ["sst2"], "data_root": "sample", "max_length": 24, "max_train_samples": 8, "max_eval_samples": 4,
        "per_device_train_batch_size": 4, "max_steps": 2, "checkpoint_at": []}  # fmt: skip


@pytest.fixture
def told(monkeypatch) -> list:
    """A package `liger_kernel` that knows Llama alone and only notes its arguments."""
    calls = []
    package, kernels, patches = (
        ModuleType(name)
        for name in ("liger_kernel", "liger_kernel.transformers", "liger_kernel.transformers.monkey_patch")
    )
    kernels._apply_liger_kernel_to_instance = lambda model, **options: calls.append((model, options))
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    for module in (package, kernels, patches):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(integration, "is_liger_kernel_available", lambda: True)
    return calls


def test_without_a_gpu_it_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build", lambda *args: pytest.fail("the model was loaded"))
    config = RunConfig().replace(**BASE, use_liger_kernel=True)
    with pytest.raises(InputError, match="--use_liger_kernel needs a GPU, but this run computes on cpu; leave it out"):
        train_adapter(config, ["sst2"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_the_package_it_is_refused(monkeypatch):
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs liger-kernel: pip install copra_llm\[liger\]"):
        check_liger(torch.device("cuda"))
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: importlib.util.spec_from_loader(name, None))
    check_liger(torch.device("cuda"))


def test_liger_gets_the_adapted_model_and_leaves_the_losses_alone(tiny_llama, told):
    """The losses are named, and off: left unnamed, one of them is on."""
    base = load_base(ModelSettings(model_name_or_path=str(tiny_llama)))
    adapted = add_adapter(base, LoraSettings(), init_seed=0)
    apply_liger(base.model)
    ((model, options),) = told
    assert model is adapted.get_base_model()
    assert options == {"cross_entropy": False, "fused_linear_cross_entropy": False}


def test_a_model_that_liger_does_not_know_is_refused(tiny_bert, told):
    """Liger itself would say nothing and change nothing."""
    base = load_base(ModelSettings(model_name_or_path=str(tiny_bert)))
    with pytest.raises(InputError, match="no kernels for models of the type bert; leave it out"):
        apply_liger(base.model)
    assert not told


def test_a_run_puts_them_in_once_and_only_if_asked(tiny_llama, tmp_path, told, monkeypatch):
    """As on a GPU, whose check is passed over here; the fake changes nothing, so neither does the run."""
    monkeypatch.setattr(train, "check_liger", lambda device: None)
    for name, wanted in (("with", True), ("without", False)):
        config = RunConfig().replace(**BASE, model_name_or_path=str(tiny_llama), use_liger_kernel=wanted)
        train_adapter(config, ["sst2"], tmp_path / name)
    assert len(told) == 1
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("with", "without")]
    assert files[0].read_bytes() == files[1].read_bytes()
