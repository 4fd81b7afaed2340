"""`copra merge` and `copra interpolate` with every rule: what they write, print, explain and refuse."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from examples import deltas_loaded_by_peft, random_adapter, rounding, tiny_adapter

from copra_llm import merge
from copra_llm.adapters import load_adapter_weights, save_adapter_weights
from copra_llm.cli import main
from copra_llm.cli.merge import LINES, OPTIONS, RULES
from copra_llm.merge import METHODS, options_of
from copra_llm.results import read_result


@pytest.fixture
def adapters(tmp_path) -> list[Path]:
    """Two that fit in everything, and one of another rank."""
    folders = [tmp_path / name for name in ("one", "two", "thin")]
    for seed, folder in enumerate(folders):
        save_adapter_weights(random_adapter(seed, 2 if folder.name == "thin" else 4), folder)
    return folders


def copra(*argv) -> int:
    return main([str(a) for a in argv])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_what_peft_loads(method, adapters, tmp_path, capsys):
    out = tmp_path / "merged"
    assert copra("merge", *adapters[:2], "--method", method, "--output", out) == 0
    merged = load_adapter_weights(out)
    loaded = deltas_loaded_by_peft(out)
    assert loaded.keys() == merged.factors.keys()
    for name, f in merged.factors.items():
        assert bool((abs(loaded[name] - f.delta_weight()) <= rounding(merged, name)).all())
    assert capsys.readouterr().out.startswith(f"{out}: {method} of 2 adapters, rank {merged.config['r']}\n")


def test_options_reach_the_rule(adapters, tmp_path, capsys):
    """What they change shows in the result and in what is printed."""
    three = ["merge", *adapters, "--weights", "0.5", "0.25", "0.25"]
    assert copra(*three, "--method", "truncated", "--rank", "2", "--output", tmp_path / "a") == 0
    assert "cut to the rank: lost " in capsys.readouterr().out
    assert copra(*three, "--method", "align-learned", "--steps", "3", "--pad", "zero", "--output", tmp_path / "b") == 0
    assert "gap to the mixture: " in capsys.readouterr().out
    for name, seed in (("c", "1"), ("d", "1"), ("e", "2")):
        more = ["--on", "delta", "--rank", "3", "--density", "0.7", "--scale", "0.5", "--seed", seed]
        assert copra(*three, "--method", "dare-ties", *more, "--output", tmp_path / name) == 0
    more = ["--method", "core-space", "--inner", "iso-c"]
    assert copra(*three, *more, "--output", tmp_path / "f") == 0
    ranks = {n: {f.r for f in load_adapter_weights(tmp_path / n).factors.values()} for n in "abcdef"}
    assert ranks["a"] == {2} and ranks["b"] == {4} and ranks["c"] == {3} and max(ranks["f"]) > 4
    first, again, other = ((tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "cde")
    assert first == again != other


def test_the_help_knows_every_rule_and_option(capsys):
    """Nothing is missing from the help, and nothing in it is made up."""
    assert list(RULES) == list(METHODS) and set(LINES) == merge.LINES
    assert set(OPTIONS) == {option for method in METHODS for option in options_of(method)}
    for command, methods in (("merge", RULES), ("interpolate", LINES)):
        with pytest.raises(SystemExit):
            copra(command, "--help")
        text = capsys.readouterr().out
        assert {name for name, line in RULES.items() if f"  {name:16} {line}" in text} == set(methods)
    for method, line in RULES.items():
        bracket = re.search(r"\[([a-z0-9., ]*)\]$", line)
        named = {part.split()[0]: part.split()[1:] for part in (bracket[1].split(", ") if bracket else [])}
        assert named.keys() | {"scale"} == {*options_of(method), "scale"}, method
        parameters = inspect.signature(METHODS[method]).parameters
        for name, default in named.items():
            assert not default or float(*default) == parameters[name].default


def test_a_line_of_another_rule(tiny_bert, tmp_path):
    """Its options are in the record; equal ends give a flat line."""
    folders = [tiny_adapter(tiny_bert, tmp_path / str(seed), seed) for seed in (1, 1)]
    argv = ["interpolate", *folders, "--task", "sst2", "--data_root", "sample", "--points", "3", "--max_length", "16"]
    argv += ["--max_eval_samples", "8", "--output", tmp_path / "line", "--method", "truncated", "--rank", "4"]
    assert copra(*argv) == 0
    record = read_result(tmp_path / "line" / "curve-0.json")
    assert (record.config["merge_method"], record.config["merge_options"]) == ("truncated", {"rank": 4})
    assert len(set(record.data["correct"])) == 1


BAD = {
    "option of another rule": (["--method", "fusion", "--rank", "2"], ["fusion has no option rank", "it takes pad"]),
    "rank": (["--method", "truncated", "--rank", "0"], ["--rank is 0"]),
    "no number": (["--method", "ties", "--density", "x"], ["--density", "'x'"]),
    "density": (["--method", "ties", "--density", "20"], ["--density is 20.0, but must be above 0 and at most 1"]),
    "inner": (["--method", "core-space", "--inner", "tsv"], ["--inner is 'tsv'"]),
    "unequal ranks": (
        ["--method", "align"],
        ["/one and", "/thin differ in rank: 4 and 2", "align needs", "--pad zero"],
    ),
    "negative": (["--method", "knots", "--weights", "1", "-1"], ["layers.0", "a weight is -1"]),
    "not finite": (["--method", "iso-c", "--weights", "1", "inf"], ["the weights are 1 inf"]),
    "sum": (["--method", "align", "--weights", "1", "1"], ["sum to 2, but align needs"]),
    "nearest flag": (["--densty", "0.5"], ['did you mean "--density"?']),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input(kind, adapters, tmp_path, capsys):
    """Exit code 2, one sentence, nothing written."""
    argv, expected = BAD[kind]
    assert copra("merge", adapters[0], adapters[2], *argv, "--output", tmp_path / "out") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and all(part in err for part in expected), err
    assert not (tmp_path / "out").exists()


def test_lines_that_do_not_end_in_the_adapters_are_refused(adapters, tmp_path, capsys):
    """Before a model is loaded: these adapters have none."""
    argv = ["interpolate", *adapters[:2], "--task", "sst2", "--output", tmp_path / "out", "--method"]
    assert copra(*argv, "ties") == 2
    assert "ties changes an adapter even at weights 1 and 0" in capsys.readouterr().err
    assert copra(*argv, "truncated", "--density", "0.5") == 2
    assert "truncated has no option density" in capsys.readouterr().err
