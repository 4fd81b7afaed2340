"""A script that starts itself anew, and what it hears of the worker."""

from __future__ import annotations

import json

import pytest

from copra_llm.errors import InputError
from copra_llm.protocols.alone import GIVEN_BACK, alone

WORKER = """
import json, os, sys
names = ("OMP_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_")
print("first")
print("second", flush=True)
sys.stderr.write("x" * 200_000 + "\\nthe reason\\n")
if sys.argv[1] == "fail":
    sys.exit(3)
if sys.argv[1] != "silent":
    print(json.dumps({"argv": sys.argv[1:], "environment": [os.environ.get(name) for name in names]}))
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    file = tmp_path / "worker.py"
    file.write_text(WORKER, encoding="utf-8")
    return file


def test_the_last_line_is_the_answer_and_the_others_are_passed_on(script):
    """However much the worker complains about besides: more than a pipe holds."""
    heard = []
    answer = alone(script, ["a", "b c"], threads=3, say=heard.append)
    assert answer == {"argv": ["a", "b c"], "environment": ["3", None]} and heard == ["first", "second"]


def test_memory_is_given_back_where_that_is_wanted(script):
    assert alone(script, ["a"], give_back=True)["environment"] == ["1", str(GIVEN_BACK)]


def test_a_worker_that_fails_says_why(script):
    with pytest.raises(InputError, match=r"worker\.py fail stopped with: the reason$"):
        alone(script, ["fail"])


def test_an_answer_is_json(script):
    """A worker that ends without one is a mistake in the script, not in its input."""
    with pytest.raises(json.JSONDecodeError):
        alone(script, ["silent"])
