"""Settings of runs and plans, from files and command lines: read, or refused by one sentence."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import yaml
from fuzzing import ODD_NUMBERS, ODD_TEXTS, drawn, efforts, odd_values, refused, spoilt
from hypothesis import example, given
from hypothesis import strategies as st

from copra_llm.config import ALL, COMMON, RunConfig, dump_yaml, parse_run_config, read_settings
from copra_llm.protocols import connectivity, landscape, layer_values, pruning
from copra_llm.protocols.federated import Federation
from copra_llm.protocols.multitask import MultiTask
from copra_llm.protocols.plans import merge_rules, read_plans
from copra_llm.protocols.sweep import Sweep
from copra_llm.settings import ImageSettings, InstructSettings

NAMES = sorted({f.name for group in ALL for f in dataclasses.fields(group)})
PLANS = (connectivity.Plan, landscape.Plan, layer_values.Plan, pruning.Plan, Federation, MultiTask, Sweep)
RECIPES = {"mtl15": COMMON, "instruct": (*COMMON, InstructSettings), "clip": (*COMMON, ImageSettings)}
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "\n".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
"""A kilobyte that stands for 9**9 texts: each line's list holds the one before nine times."""


def dumped(values) -> bytes:
    """YAML as a person could write it, however deep: that must not depend on where it is written."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        return yaml.safe_dump(values, allow_unicode=False, sort_keys=False).encode("utf-8", "surrogatepass")
    finally:
        sys.setrecursionlimit(limit)


# Numerals beyond what Python prints cannot be dumped; a file can hold them all the same.
def printable(value) -> bool:
    try:
        dumped(value)
    except (ValueError, yaml.YAMLError):
        return False
    return True


values = odd_values.filter(printable)


@efforts(60)
def test_any_settings_file(examples, tmp_path):
    """Of a run: what is read can be written, and read again as the same."""
    path = tmp_path / "config.yaml"

    @drawn(examples)
    @given(changes=st.dictionaries(st.one_of(st.sampled_from(NAMES), values.filter(
        lambda v: not isinstance(v, list | dict))), values, max_size=3), data=st.data())  # fmt: skip
    def check(changes, data):
        content = dumped(changes)
        if data.draw(st.booleans()):
            content = data.draw(spoilt(content))
        path.write_bytes(content)

        def read() -> None:
            config = RunConfig.from_flat(read_settings(path))
            path.write_text(dump_yaml(config), encoding="utf-8")
            again = RunConfig.from_flat(read_settings(path)).flat()
            assert all(value == again[key] or value != value for key, value in config.flat().items())

        refused(read)

    check()


@pytest.mark.parametrize(
    "text",
    [
        "seed: 2020-99-99",
        "seed: !!python/object/apply:os.system ['true']",
        "seed: " + "9" * 5000,
        "a: " + "[" * 20_000,
        "? [a]\n: b",
        "&a [*a]",
        "learning_rate: &a [*a]",
        "tasks: &a [*a]",
        BOMB,
        BOMB + "\ntasks: *i",
        BOMB + "\nlearning_rate: *i",
        "<<: 5",
        "- a\n- b",
        "seed: 1\nseed: 2",
        "\x00",
        "seed: 0x" + "f" * 5000,
        "lora_r: 1e400",
        "max_steps: 99999999999999999999999999",
        "learning_rate: 1:2:3",
        "layer_pattern: '(a+)+$'",
        "seed: 0b2",
        "%YAML 9.9\n---\nseed: 1",
    ],
    ids=lambda text: text[:20].encode("unicode_escape").decode(),
)
def test_yaml_that_stands_for_something_else(text, tmp_path):
    """Dates, tags, aliases of themselves and of many, numerals without end: as settings of a run and as a plan."""
    path = tmp_path / "file.yaml"
    path.write_text(text, encoding="utf-8")
    refused(lambda: RunConfig.from_flat(read_settings(path)))
    for kind in PLANS:
        refused(lambda kind=kind: read_plans(path, kind))


@efforts(60)
def test_any_command_line(examples, tmp_path):
    """Of the three recipes."""
    words = st.one_of(
        st.sampled_from(NAMES).map(lambda name: f"--{name}"),
        st.sampled_from(ODD_TEXTS),
        st.sampled_from(ODD_NUMBERS[:9] + ODD_NUMBERS[11:]).map(str),
        st.sampled_from(["--config", "--", "-", "--=", "---", "--seed=", "--no_bf16", "--config=x", "@x"]),
        st.text(max_size=5),
    )

    @drawn(examples)
    @given(argv=st.lists(words, max_size=6), groups=st.sampled_from(sorted(RECIPES)))
    @example(argv=["--seed", "9" * 5000], groups="mtl15")
    @example(argv=["--lora_r", "1e3"], groups="mtl15")
    @example(argv=["--config", str(Path("/"))], groups="mtl15")
    @example(argv=["--config", "\x00"], groups="mtl15")
    @example(argv=["--config", "x" * 5000], groups="mtl15")
    @example(argv=["--layer_pattern", "(a+)+$"], groups="mtl15")
    def check(argv, groups):
        if not {"--help", "-h"} & set(argv):
            refused(lambda: parse_run_config(argv, groups=RECIPES[groups]))

    check()


@efforts(60)
def test_any_plan(examples, tmp_path):
    """Of every protocol: entries that are missing, unknown or of another type."""
    path = tmp_path / "plan.yaml"

    @drawn(examples)
    @given(data=st.data(), kind=st.sampled_from(PLANS))
    def check(data, kind):
        fields = [f.name for f in dataclasses.fields(kind)]
        nested = st.dictionaries(st.sampled_from([*NAMES[:20], "lora", "sst2", "ties"]), values, max_size=2)
        keys = st.one_of(st.sampled_from(fields), st.sampled_from(ODD_TEXTS))
        entry = st.dictionaries(keys, st.one_of(values, nested), max_size=4)
        names = st.sampled_from(["all", "minilm", "", "x"])
        plan = data.draw(st.dictionaries(names, st.one_of(entry, values), max_size=2))
        path.write_bytes(dumped(plan))
        refused(lambda: read_plans(path, kind))

    check()


@efforts(60)
def test_any_merge_rules(examples):
    names = ["method", "density", "rank", "scale", "seed", "on", "inner"]
    options = st.dictionaries(st.sampled_from(names), values, max_size=3)

    @drawn(examples)
    @given(entries=st.dictionaries(st.sampled_from(["fusion", "ties", "x", ""]), st.one_of(values, options)))
    def check(entries):
        refused(lambda: merge_rules(entries))

    check()
