"""The merging benchmark at a small size, and the table that is made of its record."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from copra_llm.merge import METHODS
from copra_llm.results import read_result
from copra_llm.summaries.speed import merging_table

SCRIPT = Path(__file__).resolve().parents[1] / "eval" / "speed" / "merge.py"


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("speed")
    sizes = {"layers": 2, "adapters": 2, "rank": 2, "hidden": 24, "mlp": 40}
    argv = [str(SCRIPT), "--results", str(folder), *(str(x) for k, v in sizes.items() for x in (f"--{k}", v))]
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", argv)
    try:
        assert runpy.run_path(str(SCRIPT))["main"]() == 0
    finally:
        patch.undo()
    return read_result(folder / "merge.json")


def test_the_whole_is_the_sample_times_how_often_it_occurs(record):
    """Two layers of four square and three MLP projections, over what this package took for all of them."""
    m = record.metrics
    for label in ("svd", "svd thin"):
        whole = 2 * (4 * m["cpu_seconds/square/PEFT svd"] + 3 * m[f"cpu_seconds/tall/PEFT {label}"])
        assert m[f"cpu_seconds/whole, PEFT {label}, extrapolated"] == pytest.approx(whole)
        assert m[f"cpu_ratio/whole, {label}"] == pytest.approx(whole / m["cpu_seconds/whole/truncated"])
    assert {name.removeprefix("cpu_seconds/layer/") for name in m if "cpu_seconds/layer/" in name} == set(METHODS)


def test_both_merge_to_the_same(record):
    """Random factors have small gaps: float32's SVD is off by up to 1e-4 (measured 1e-6)."""
    apart = [value for name, value in record.metrics.items() if name.startswith("distance_to_PEFT/")]
    assert len(apart) == 3 and max(apart) < 1e-4


def test_table(record):
    table = merging_table([record])
    assert "| one module, 24 × 24 | " in table and "| one module, 40 × 24, PEFT thin | " in table
    assert "| all 14 modules | " in table and "(extrapolated)" in table
    assert all(f"| `{method}` | " in table for method in METHODS)
    assert merging_table([]) == ""
