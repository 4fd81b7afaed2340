"""A script that starts itself anew, and what it hears of the worker."""

from __future__ import annotations

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


def test_a_line_of_json_is_the_answer_and_the_others_are_passed_on(script):
    """However much the worker complains about besides: more than a pipe holds."""
    heard = []
    answer = alone(script, ["a", "b c"], threads=3, say=heard.append)
    assert answer == {"argv": ["a", "b c"], "environment": ["3", None]} and heard == ["first", "second"]


def test_memory_is_given_back_where_that_is_wanted(script):
    assert alone(script, ["a"], give_back=True)["environment"] == ["1", str(GIVEN_BACK)]


def test_a_worker_that_fails_says_why(script):
    with pytest.raises(InputError, match=r"worker\.py fail stopped with: the reason$"):
        alone(script, ["fail"])


def test_a_worker_without_an_answer_has_failed(script):
    with pytest.raises(InputError, match="silent stopped with: the reason$"):
        alone(script, ["silent"])


def test_what_is_said_comes_at_once(script):
    """Not when the worker has ended: it waits for what is done on hearing it."""
    sign = script.with_name("sign")
    waiting = "import pathlib, time\nprint('ready', flush=True)\n"
    waiting += f"while not pathlib.Path({str(sign)!r}).exists():\n    time.sleep(0.01)\nprint(1)\n"
    script.write_text(waiting, encoding="utf-8")
    assert alone(script, [], say=lambda line: sign.touch()) == 1
