"""PEFT's `add_weighted_adapter` beside these rules: equal where it is right, and where it is not.

A test of what PEFT (0.21.2) gets wrong fails once PEFT gets it right; its sentence in the README must then go.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from examples import Blocks, deltas_in, deltas_loaded_by_peft, peft_adapter
from peft import PeftModel
from torch import Tensor

from copra_llm.adapters import AdapterWeights, load_adapter_weights, save_adapter_weights
from copra_llm.merge import merge

R = 4


@pytest.fixture
def adapters(tmp_path):
    """Makes two adapters with PEFT and gives their folders: `adapters(use_rslora=True, ...)`."""

    def make(**settings) -> list[Path]:
        folders = [tmp_path / "first", tmp_path / "second"]
        for seed, folder in enumerate(folders):
            peft_adapter(folder, seed=seed, **{"r": R, "lora_alpha": R} | settings)
        return folders

    return make


def by_peft(folders: list[Path], weights: list[float], kind: str, **options) -> PeftModel:
    """PEFT's merge, as the adapter `default` of a model."""
    model = PeftModel.from_pretrained(Blocks(), folders[0], adapter_name="first")
    model.load_adapter(folders[1], adapter_name="second")
    model.add_weighted_adapter(["first", "second"], weights, "default", combination_type=kind, **options)
    return model


def ours(folders: list[Path], weights: list[float], method: str, **options) -> AdapterWeights:
    return merge([load_adapter_weights(f) for f in folders], method, weights, **options)


def true_sum(folders: list[Path], weights: list[float]) -> dict[str, Tensor]:
    first, second = (load_adapter_weights(f).factors for f in folders)
    return {n: weights[0] * first[n].delta_weight() + weights[1] * second[n].delta_weight() for n in first}


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest relative distance over the modules."""
    return max(float((a[n] - b[n]).norm() / b[n].norm()) for n in b)


def deltas(merged: AdapterWeights) -> dict[str, Tensor]:
    return {n: f.delta_weight() for n, f in merged.factors.items()}


# --- equal ----------------------------------------------------------------------------------------------------------


def test_truncated_is_pefts_svd(adapters):
    """Plain LoRA, some layers of another alpha: the same best approximation, to float32's rounding."""
    folders = adapters(lora_alpha=3)
    theirs = deltas_in(by_peft(folders, [0.3, 0.7], "svd", svd_rank=R))
    assert distance(theirs, deltas(ours(folders, [0.3, 0.7], "truncated", rank=R))) < 1e-5


@pytest.mark.parametrize("kind, on", [("ties", "factors"), ("ties_svd", "delta")])
def test_ties_is_pefts(adapters, kind, on):
    """At weights of 1, where its sum over a count is a mean; 24, 16 and 48 entries keep 12, 8 and 24."""
    folders = adapters()
    options = {"svd_rank": R} if on == "delta" else {}
    theirs = deltas_in(by_peft(folders, [1.0, 1.0], kind, density=0.5, **options))
    assert distance(theirs, deltas(ours(folders, [1.0, 1.0], "ties", density=0.5, on=on))) < 1e-5


# --- not equal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, method", [("svd", "truncated"), ("cat", "mixture")])
def test_rslora_is_scaled_once(adapters, kind, method):
    """PEFT writes alpha = r and keeps rsLoRA's alpha / sqrt(r): its merge is sqrt(rank) too large."""
    folders = adapters(use_rslora=True)
    weights, rank = [0.3, 0.7], R if kind == "svd" else 2 * R
    expected = true_sum(folders, weights)
    if kind == "svd":
        expected = {n: _cut(d, R) for n, d in expected.items()}
    theirs = deltas_in(by_peft(folders, weights, kind))
    assert distance(theirs, expected) == pytest.approx(rank**0.5 - 1, rel=1e-4)
    assert distance(deltas(ours(folders, weights, method)), expected) < 1e-6


def test_rslora_is_right_after_loading(adapters, tmp_path):
    """What plain PEFT makes of the written folder, too."""
    folders = adapters(use_rslora=True)
    save_adapter_weights(ours(folders, [0.3, 0.7], "truncated", rank=R), tmp_path / "merged")
    expected = {n: _cut(d, R) for n, d in true_sum(folders, [0.3, 0.7]).items()}
    assert distance(deltas_loaded_by_peft(tmp_path / "merged"), expected) < 1e-6


@pytest.mark.parametrize(
    "kind, method, options", [("linear", "mixture", {}), ("dare_linear", "dare", {"density": 1.0})]
)
def test_sums_have_no_cross_terms(adapters, kind, method, options):
    """(sum sqrt(w) B)(sum sqrt(w) A) holds B_1 A_2 and B_2 A_1, as large as the sum itself."""
    folders = adapters()
    theirs = deltas_in(by_peft(folders, [0.5, 0.5], kind, **options))
    expected = true_sum(folders, [0.5, 0.5])
    assert distance(theirs, expected) > 0.5
    assert distance(deltas(ours(folders, [0.5, 0.5], method, **options)), expected) < 1e-6


def test_merges_of_unequal_ranks_can_be_loaded(adapters, tmp_path):
    """PEFT forgets the `rank_pattern`, so that it cannot load what it has saved."""
    folders = adapters(rank_pattern={"v_proj": 2})
    by_peft(folders, [0.5, 0.5], "linear").save_pretrained(tmp_path / "theirs", selected_adapters=["default"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        deltas_loaded_by_peft(tmp_path / "theirs")
    save_adapter_weights(ours(folders, [0.5, 0.5], "fusion"), tmp_path / "ours")
    merged = load_adapter_weights(tmp_path / "ours")
    assert {f.r for f in merged.factors.values()} == {2, R}
    assert distance(deltas_loaded_by_peft(tmp_path / "ours"), deltas(merged)) < 1e-6


def _cut(delta: Tensor, rank: int) -> Tensor:
    U, S, Vh = np.linalg.svd(delta.numpy())
    return torch.from_numpy((U[:, :rank] * S[:rank]) @ Vh[:rank])
