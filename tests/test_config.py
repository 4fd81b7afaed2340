"""Settings from defaults, YAML and command line: `copra_llm.config`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from copra_llm.config import COMMON, RunConfig, dump_yaml, parse_run_config, read_settings
from copra_llm.errors import InputError
from copra_llm.schedule import METHODS
from copra_llm.settings import DataSettings, LoraSettings, ScheduleSettings, TrainSettings

FIELDS = [f for group in COMMON for f in dataclasses.fields(group)]
"""Every setting of every group."""


@pytest.fixture
def written(tmp_path):
    """Writes a YAML file and returns its path as text."""

    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def refusal(argv: list[str]) -> str:
    with pytest.raises(InputError) as refused:
        parse_run_config(argv)
    return str(refused.value)


# --- where a value comes from -----------------------------------------------------------------------------


def test_defaults_stand_without_arguments():
    assert parse_run_config([]) == RunConfig()


def test_yaml_wins_over_defaults_and_flags_over_yaml(written):
    """defaults < --config FILE < --key value, wherever --config stands on the line."""
    path = written("lora_r: 3\nseed: 7\ntasks: [rte, sst2]\n")
    for argv in (["--config", path, "--seed", "9"], ["--seed", "9", f"--config={path}"]):
        config = parse_run_config(argv)
        assert (config.lora.lora_r, config.train.seed, config.data.tasks) == (3, 9, ["rte", "sst2"])
        assert config.lora.lora_alpha == LoraSettings().lora_alpha


def test_a_flags_list_replaces_the_yamls(written):
    path = written("tasks: [rte, sst2]\njoint: true\n")
    config = parse_run_config(["--config", path, "--tasks", "agnews", "--joint", "false"])
    assert config.data.tasks == ["agnews"] and config.data.joint is False


def test_a_hyphen_is_as_good_as_an_underscore():
    assert parse_run_config(["--lora-r", "3", "--max-train-samples=5"]) == parse_run_config(
        ["--lora_r", "3", "--max_train_samples", "5"]
    )


def test_a_written_config_repeats_the_run(written):
    """`config.yaml` of a run, given back as --config, is the same configuration."""
    argv = ["--tasks", "sst2", "rte", "--learning_rate", "3e-4", "--lora_alpha", "4", "--mask_seed", "5", "--joint",
            "--checkpoint_at", "0.25", "0.5", "--data_root", "sample", "--method", "coto"]  # fmt: skip
    config = parse_run_config(argv)
    assert parse_run_config(["--config", written(dump_yaml(config))]) == config


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--lora_rank", "4"], '--lora_rank (did you mean "lora_r"?)'),
        (["--learningrate=1"], '--learningrate (did you mean "learning_rate"?)'),
        (["--max-step", "4"], '--max_step (did you mean "max_steps"?)'),
        (["--tasks", "sst2", "--zzz"], "--zzz; see --help"),
    ],
)
def test_unknown_flag_names_the_nearest(argv, named):
    assert named in refusal(argv)


def test_an_abbreviation_is_not_guessed():
    """`--lora` is a beginning of several flags; no flag is what it says."""
    assert "there is no flag --lora" in refusal(["--lora", "4"])
    assert "there is no flag --learning" in refusal(["--learning", "0.1"])


def test_a_stray_word_is_refused():
    assert "sst2" in refusal(["sst2"])


def test_unknown_key_names_file_and_nearest(written):
    path = written("lora_r: 4\nlearing_rate: 1.0e-3\n")
    assert refusal(["--config", path]) == f'{path}: there is no setting "learing_rate" (did you mean "learning_rate"?)'


def test_an_unknown_name_is_no_setting_of_a_config():
    """`replace` and `from_flat` drop nothing silently."""
    with pytest.raises(InputError, match=r'no setting "lora_rank" \(did you mean "lora_r"\?\)'):
        RunConfig().replace(lora_rank=4)
    with pytest.raises(InputError, match="task_list"):
        RunConfig.from_flat({"task_list": ["sst2"]})


# --- types ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, name, value",
    [
        ("learning_rate: 1e-3", "learning_rate", 1e-3),  # YAML 1.1 reads this as text
        ('learning_rate: "1e-3"', "learning_rate", 1e-3),
        ("learning_rate: 2", "learning_rate", 2.0),
        ("num_train_epochs: 3", "num_train_epochs", 3.0),
        ("checkpoint_at: [1, 0.5]", "checkpoint_at", [1.0, 0.5]),
        ("checkpoint_at: []", "checkpoint_at", []),
        ("tasks: sst2", "tasks", ["sst2"]),
        ("eval_steps: null", "eval_steps", None),
        ("eval_steps: 5", "eval_steps", 5),
        ("p_start: 0", "p_start", 0.0),
        ("bf16: true", "bf16", True),
        ("model_name_or_path: 7", "model_name_or_path", "7"),
        ("data_root: null", "data_root", None),
    ],
)
def test_yaml_values_get_their_fields_type(line, name, value, written):
    read = read_settings(Path(written(line)))[name]
    assert read == value and type(read) is type(value)
    if isinstance(value, list):
        assert [type(a) for a in read] == [type(a) for a in value]


@pytest.mark.parametrize(
    "line, kind",
    [
        ("lora_r: 4.0", "int"),
        ("lora_r: '4'", "int"),
        ("lora_r: true", "int"),
        ("lora_r: null", "int"),
        ("seed: [1]", "int"),
        ("learning_rate: fast", "float"),
        ("learning_rate: true", "float"),
        ("learning_rate: null", "float"),
        ("joint: 1", "bool"),
        ("joint: 'no thanks'", "bool"),
        ("data_root: true", "str"),
        ("tasks: [true]", "str"),
        ("checkpoint_at: [early]", "float"),
    ],
)
def test_yaml_values_of_another_type_are_refused(line, kind, written):
    """By file, name, value and the type it must have."""
    path = written(line)
    message = refusal(["--config", path])
    assert message.startswith(f"{path}: {line.split(':')[0]} is ") and message.endswith(f"must be of type {kind}")


@pytest.mark.parametrize("argv", [["--lora_r", "four"], ["--learning_rate", "fast"], ["--bf16", "perhaps"], ["--seed"]])
def test_flags_of_another_type_are_refused(argv):
    """In argparse's words, with a place and without a traceback."""
    assert argv[0] in refusal(argv) and refusal(argv).startswith("command line: ")


@pytest.mark.parametrize(
    "content, named",
    [
        (b"lora_r: 4\n  seed: [1,\n", "line 2 is not YAML"),
        (b"- lora_r\n", "holds a list"),
        (b"just text", "holds a str"),
        (b"seed: \xff\n", "not UTF-8"),
    ],
)
def test_a_file_that_is_no_settings_is_refused(content, named, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    message = refusal(["--config", str(path)])
    assert str(path) in message and named in message


def test_a_missing_file_is_refused(tmp_path):
    assert f"{tmp_path}/no.yaml does not exist" in refusal(["--config", f"{tmp_path}/no.yaml"])
    assert refusal(["--config"]) == "--config needs a value; give a YAML file of settings"


def test_an_empty_file_changes_nothing(written):
    assert parse_run_config(["--config", written("")]) == RunConfig()


# --- the groups together ----------------------------------------------------------------------------------


def test_every_setting_says_what_it_is():
    """The help text is the documentation; names are unique over the groups, so that `flat` loses none."""
    assert all(len(f.metadata["help"]) > 15 and f.metadata["help"].endswith(".") for f in FIELDS)
    assert len({f.name for f in FIELDS}) == len(FIELDS)


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_run_config(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(f"--{f.name}" in text for f in FIELDS)


@settings(max_examples=30, deadline=None)
@given(
    changes=st.fixed_dictionaries(
        {},
        optional={
            "lora_r": st.integers(1, 64),
            "learning_rate": st.floats(1e-6, 1.0),
            "method": st.sampled_from(sorted(METHODS)),
            "p_start": st.none() | st.floats(0.0, 1.0),
            "tasks": st.lists(st.sampled_from(["sst2", "rte", "qqp"]), min_size=1, unique=True),
            "max_train_samples": st.none() | st.integers(1, 9),
            "mask_seed": st.none() | st.integers(0, 2**32),
            "checkpoint_at": st.lists(st.floats(0.01, 1.0)),
        },
    )
)
def test_from_flat_inverts_flat(changes):
    """And `replace` changes exactly what it is told to."""
    config = RunConfig().replace(**changes)
    assert RunConfig.from_flat(config.flat()) == config
    assert config.flat() == RunConfig().flat() | changes
    assert yaml.safe_load(dump_yaml(config)) == config.flat()


def test_one_seed_feeds_three_streams_and_each_can_be_pinned():
    train = TrainSettings(seed=3, mask_seed=8)
    assert [train.seed_of(stream) for stream in ("init", "data", "mask")] == [3, 3, 8]
    assert TrainSettings(seed=3, data_seed=0).seed_of("data") == 0


def test_method_presets_with_settings_in_their_place():
    assert ScheduleSettings(method="lora").schedule() == METHODS["lora"]
    mixed = ScheduleSettings(method="coto", ramp_fraction=0.5, ramp_shape="cosine").schedule()
    assert (mixed.p_start, mixed.p_end, mixed.ramp_fraction, mixed.shape) == (0.1, 1.0, 0.5, "cosine")


CONTRADICTIONS = {
    "lora_r=0": (LoraSettings, {"lora_r": 0}),
    "lora_alpha=0": (LoraSettings, {"lora_alpha": 0}),
    "lora_alpha=nan": (LoraSettings, {"lora_alpha": math.nan}),
    "lora_dropout=1.0": (LoraSettings, {"lora_dropout": 1.0}),
    "lora_target_modules=[]": (LoraSettings, {"lora_target_modules": []}),
    "method='copa'": (ScheduleSettings, {"method": "copa"}),
    "p_start=1.5": (ScheduleSettings, {"p_start": 1.5}),
    "p_end=0.0": (ScheduleSettings, {"p_end": 0.0}),
    "ramp_fraction=0.0": (ScheduleSettings, {"ramp_fraction": 0.0}),
    "ramp_shape='square'": (ScheduleSettings, {"ramp_shape": "square"}),
    "granularity='head'": (ScheduleSettings, {"granularity": "head"}),
    "layer_pattern='('": (ScheduleSettings, {"layer_pattern": "("}),
    "tasks=[]": (DataSettings, {"tasks": []}),
    "tasks twice": (DataSettings, {"tasks": ["sst2", "rte", "sst2"]}),
    "max_length=0": (DataSettings, {"max_length": 0}),
    "max_train_samples=0": (DataSettings, {"max_train_samples": 0}),
    "max_eval_samples=-1": (DataSettings, {"max_eval_samples": -1}),
    "max_steps=0": (TrainSettings, {"max_steps": 0}),
    "max_steps=-5": (TrainSettings, {"max_steps": -5}),
    "num_train_epochs=0": (TrainSettings, {"num_train_epochs": 0}),
    "learning_rate=-1.0": (TrainSettings, {"learning_rate": -1.0}),
    "learning_rate=nan": (TrainSettings, {"learning_rate": math.nan}),
    "learning_rate=inf": (TrainSettings, {"learning_rate": math.inf}),
    "per_device_train_batch_size=0": (TrainSettings, {"per_device_train_batch_size": 0}),
    "per_device_eval_batch_size=0": (TrainSettings, {"per_device_eval_batch_size": 0}),
    "gradient_accumulation_steps=0": (TrainSettings, {"gradient_accumulation_steps": 0}),
    "warmup_steps=-1": (TrainSettings, {"warmup_steps": -1}),
    "weight_decay=nan": (TrainSettings, {"weight_decay": math.nan}),
    "seed=-1": (TrainSettings, {"seed": -1}),
    "mask_seed=-1": (TrainSettings, {"mask_seed": -1}),
    "init_seed=2**64": (TrainSettings, {"init_seed": 2**64}),
    "lr_scheduler_type='warmup_stable_decay'": (TrainSettings, {"lr_scheduler_type": "warmup_stable_decay"}),
    "logging_steps=0": (TrainSettings, {"logging_steps": 0}),
    "save_total_limit=0": (TrainSettings, {"save_total_limit": 0}),
    "checkpoint_at=[0.5, 1.5]": (TrainSettings, {"checkpoint_at": [0.5, 1.5]}),
    "checkpoint_at=[0.0]": (TrainSettings, {"checkpoint_at": [0.0]}),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_impossible_values_are_refused_by_name(case):
    """The setting that is wrong stands in the sentence."""
    group, values = CONTRADICTIONS[case]
    with pytest.raises(InputError, match=rf"^(--)?{next(iter(values))} (is|names) "):
        group(**values)


def test_contradictions_are_refused():
    assert refusal(["--bf16", "--fp16"]) == "--bf16 and --fp16 were both given; choose one"


def test_unknown_scheduler_names_the_nearest():
    """Before a model is loaded, not after."""
    assert 'did you mean "cosine"?' in refusal(["--lr_scheduler_type", "cosin"])
