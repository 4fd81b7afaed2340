"""Do the launch configurations start what their headers say?"""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from conftest import ROOT
from examples import write_conversations
from launches import COMMANDS, CONFIGS, FILES, Shown, header, shown
from pairs import RECIPE
from test_processes import ROUNDING, far
from test_train import flags, settings

from copra_llm.config import ALL
from copra_llm.results import read_result
from copra_llm.train import train_adapter

sys.path.insert(0, str(ROOT / "eval" / "backends"))
import launching  # noqa: E402
import multi_node  # noqa: E402

YAML = [path for path in FILES if path.suffix == ".yaml"]
FLAGS = {f"--{f.name}" for group in ALL for f in dataclasses.fields(group)}
NODES = multi_node.why_not()
needs_nodes = pytest.mark.skipif(NODES is not None, reason=str(NODES))


def named(value) -> str:
    return f"{value.file}-{COMMANDS.index(value)}" if isinstance(value, Shown) else Path(value).name


# --- what stands in the files -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", YAML, ids=named)
def test_accelerate_reads_the_file(path):
    """Its own parser takes every entry, and none of those that it reads as flags alone stands there."""
    config = load_config_from_file(str(path))
    assert config.num_processes >= 1 and config.num_machines >= 1
    assert not {"rdzv_backend", "same_network"} & set(yaml.safe_load(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", FILES, ids=named)
def test_the_header_says_what_for_and_how(path):
    """A sentence, then commands that start with this file."""
    first, *_ = header(path)
    assert not first.startswith("   ") and first.endswith(".")
    assert any(path.name in " ".join(command.words) for command in shown(path))


@pytest.mark.parametrize("command", COMMANDS, ids=named)
def test_a_command_of_a_header_is_understood(command):
    """Its files exist, Accelerate's parser takes its flags, and the recipe knows those that are left to it."""
    launcher, *rest = command.words
    if launcher == "accelerate":
        args = launch_command_parser().parse_args(rest[1:])
        assert args.config_file == f"accelerate_configs/{command.file}"
        _validate_launch_command(args)
        if args.deepspeed_hostfile is not None:
            assert (ROOT / args.deepspeed_hostfile).is_file()
        script, argv = args.training_script, args.training_script_args
    else:
        assert launcher in ("torchrun", "sbatch")
        at = next(i for i, word in enumerate(rest) if word.startswith("recipes/"))
        script, argv = rest[at], rest[at + 1 :]
    assert (ROOT / script).is_file()
    assert {word for word in argv if word.startswith("--")} <= FLAGS


def test_what_a_file_says_of_rendezvous_does_nothing(tmp_path):
    """Why c10d is a flag in the headers: Accelerate's own default stands before the file's entry."""
    config = tmp_path / "nodes.yaml"
    text = (CONFIGS / "ddp_nodes.yaml").read_text(encoding="utf-8")
    config.write_text(f"{text}rdzv_backend: c10d\n", encoding="utf-8")
    args = launch_command_parser().parse_args(["--config_file", str(config), "script.py"])
    _validate_launch_command(args)
    assert args.rdzv_backend == "static"


@pytest.mark.deepspeed
def test_deepspeed_reads_the_hostfile():
    """Two machines, the first of which leads, with as many places as zero2_nodes.yaml has processes."""
    from deepspeed.launcher.runner import fetch_hostfile

    places = fetch_hostfile(str(CONFIGS / "hostfile"))
    assert list(places) == ["node0", "node1"]
    assert sum(places.values()) == load_config_from_file(str(CONFIGS / "zero2_nodes.yaml")).num_processes


# --- started ----------------------------------------------------------------------------------------------


def small(script: str, model: Path, folder: Path) -> list[str]:
    """Flags of a recipe, by which a run takes a few steps; they stand after the header's, and so before them."""
    if script == "recipes/train_mtl15.py":
        config = settings(model, tasks=["sst2"], per_device_train_batch_size=2, max_steps=4)
        return flags(config.replace(output_dir=str(folder)))
    talk = write_conversations(folder / "talk.jsonl", 24)
    return [f"--model_name_or_path={model}", f"--dataset_name={talk}", "--chat_template=plain", "--dev_size=4",
            "--max_length=64", "--per_device_train_batch_size=2", "--max_steps=4",
            f"--output_dir={folder / 'run'}"]  # fmt: skip


def first_command(name: str, needed: str) -> Shown:
    """The first of a file's header that has this word."""
    return next(c for c in shown(CONFIGS / name) if needed in c.words)


def started(command: Shown, processes: int, model: Path, folder: Path, on_gpus: bool = False) -> dict:
    """Start a header's command on this machine, and return the record's environment.

    What is changed: the number of processes and the port; the variables of `launching.CPU`; the settings of the run.
    """
    words = list(command.words)
    at = next(i for i, word in enumerate(words) if word.startswith("recipes/"))
    if words[0] == "accelerate":
        launcher = ["-m", "accelerate.commands.launch", *words[2:at], "--num_processes", str(processes),
                    "--main_process_port", "0"]  # fmt: skip
    else:
        launcher = ["-m", "torch.distributed.run", *words[1:at]]
    log = folder / "log"
    with open(log, "w", encoding="utf-8") as said:
        done = subprocess.run([sys.executable, *launcher, *words[at:], *small(words[at], model, folder)], cwd=ROOT,
                              env=launching.environment(command.file, on_gpus) | command.variables, stdout=said,
                              stderr=said, timeout=launching.SECONDS, check=False)  # fmt: skip
    assert done.returncode == 0, log.read_text(encoding="utf-8")
    (record,) = folder.rglob("result.json")
    return read_result(record).environment


slow, deepspeed = pytest.mark.slow, pytest.mark.deepspeed
STARTS = [
    pytest.param("single.yaml", "--load_in_4bit", 1, "one process", marks=slow),
    ("cpu.yaml", "accelerate", 2, "DDP"),
    pytest.param("cpu.yaml", "torchrun", 2, "DDP", marks=slow),
    ("fsdp2.yaml", "accelerate", 2, "FSDP2"),
    pytest.param("fsdp2.yaml", "--load_in_4bit", 2, "FSDP2", marks=slow),
    pytest.param("zero1.yaml", "accelerate", 2, "ZeRO-1", marks=deepspeed),
    pytest.param("zero2.yaml", "accelerate", 2, "ZeRO-2", marks=deepspeed),
    pytest.param("zero3.yaml", "accelerate", 2, "ZeRO-3", marks=deepspeed),
    pytest.param("zero3.yaml", "--offload_param_device", 2, "ZeRO-3", marks=deepspeed),
    pytest.param("zero3.yaml", "--load_in_4bit", 2, "ZeRO-3", marks=deepspeed),
]
"""File, a word of the header's command, processes, and what the record calls the backend."""


@pytest.mark.parametrize("name, needed, processes, backend", STARTS)
def test_a_configuration_starts_on_cpus(name, needed, processes, backend, tiny_llama, tmp_path):
    """As many processes as were asked for, of the file's backend; Accelerate's MULTI_CPU, say, would start one."""
    found = started(first_command(name, needed), processes, tiny_llama, tmp_path)
    assert (found["world_size"], found["backend"]) == (processes, backend)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name, needed, processes, backend",
    [("single.yaml", "--load_in_4bit", 1, "one process"), ("ddp.yaml", "recipes/train_mtl15.py", 2, "DDP"),
     ("ddp.yaml", "--load_in_4bit", 2, "DDP"), ("fsdp2.yaml", "recipes/train_mtl15.py", 2, "FSDP2"),
     ("fsdp2.yaml", "--fsdp_offload_params", 2, "FSDP2"), ("zero2.yaml", "accelerate", 2, "ZeRO-2"),
     ("zero3.yaml", "accelerate", 2, "ZeRO-3"), ("zero3.yaml", "--offload_param_device", 2, "ZeRO-3")],
)  # fmt: skip
def test_a_configuration_starts_on_gpus(name, needed, processes, backend, tiny_llama, tmp_path):
    """The same where there are GPUs, as many as processes."""
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs, and there are {torch.cuda.device_count()}")
    found = started(first_command(name, needed), processes, tiny_llama, tmp_path, on_gpus=True)
    assert (found["world_size"], found["backend"]) == (processes, backend)
    assert found["device"] != "cpu"


# --- two machines -----------------------------------------------------------------------------------------


LISTEN = "import socket; c, _ = socket.create_server(('node0', 5000)).accept(); print(c.recv(9).decode())"
SEND = """
import socket, time
for _ in range(600):
    try:
        socket.create_connection(("localhost", 5000)).close()
        raise SystemExit("node0 answers on this node's loopback")
    except ConnectionRefusedError:
        pass
    try:
        socket.create_connection(("node0", 5000)).sendall(socket.gethostname().encode())
        break
    except ConnectionRefusedError:
        time.sleep(0.05)
"""


@needs_nodes
def test_nodes_meet_over_the_cable_alone(tmp_path):
    """One reaches the other by its name, not over its own loopback; this machine keeps its name and has no cable."""
    logs, before = [tmp_path / "node0", tmp_path / "node1"], os.uname().nodename
    commands = [[sys.executable, "-c", program] for program in (LISTEN, SEND)]
    codes = multi_node.run(commands, os.environ, logs, seconds=60)
    assert codes == [0, 0], logs[1].read_text(encoding="utf-8")
    assert logs[0].read_text(encoding="utf-8") == "node1\n"
    assert os.uname().nodename == before and "node1" not in Path("/etc/hosts").read_text(encoding="utf-8")
    assert "cable" not in [name for _, name in socket.if_nameindex()]


def wait_until_running(command: list[str], wanted: bool) -> None:
    end = time.monotonic() + 60
    while any(p.info["cmdline"] == command for p in psutil.process_iter(["cmdline"])) != wanted:
        assert time.monotonic() < end
        time.sleep(0.05)


@needs_nodes
def test_a_node_that_hangs_is_ended_with_all_its_processes(tmp_path):
    """Also one that a process of the node has started."""
    with pytest.raises(subprocess.TimeoutExpired):
        multi_node.run([["bash", "-c", "sleep 987 & sleep 987"]], os.environ, [tmp_path / "log"], seconds=1)
    wait_until_running(["sleep", "987"], False)


@needs_nodes
def test_a_node_ends_with_the_process_that_made_it(tmp_path):
    """Even with one that is killed."""
    program = "import os, pathlib, multi_node as m; m.run([['sleep', '986']], os.environ, [pathlib.Path('log')], 900)"
    place = os.environ | {"PYTHONPATH": str(ROOT / "eval" / "backends")}
    maker = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=place)
    wait_until_running(["sleep", "986"], True)
    maker.kill()
    maker.wait()
    wait_until_running(["sleep", "986"], False)


def alone_and_together(model: Path, folder: Path):
    """A run's settings for each of two processes, once one process has trained with the same micro-batches."""
    config = settings(model, tasks=["sst2"], per_device_train_batch_size=2, method="copra")
    train_adapter(config.replace(gradient_accumulation_steps=2), ["sst2"], folder / "alone")
    return config.replace(output_dir=str(folder))


def assert_same(folder: Path, backend: str) -> None:
    found = read_result(folder / "sst2" / "result.json").environment
    assert (found["world_size"], found["backend"]) == (2, backend)
    assert far(folder / "alone" / "adapter", folder / "sst2" / "adapter") < ROUNDING


@needs_nodes
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
@pytest.mark.parametrize(
    "name, backend",
    [pytest.param("ddp_nodes.yaml", "DDP", marks=slow), pytest.param("zero2_nodes.yaml", "ZeRO-2", marks=deepspeed)],
)
def test_two_machines_train_the_adapter_of_one_process(name, backend, rendezvous, tiny_llama, tmp_path):
    """Two network namespaces, a process in each, started with the header's flags for either rendezvous."""
    config = alone_and_together(tiny_llama, tmp_path)
    words = first_command(name, "c10d" if rendezvous == "c10d" else "--machine_rank").words
    given = words[words.index(f"accelerate_configs/{name}") + 1 : words.index("recipes/train_mtl15.py")]
    given = " ".join(given).replace("--machine_rank 0", "--machine_rank {rank}").split()
    codes = launching.launch(name, given, [RECIPE, *flags(config)], tmp_path / "logs", processes=2, nodes=2)
    assert codes == [0, 0], "\n".join(log.read_text(encoding="utf-8") for log in (tmp_path / "logs").iterdir())
    assert_same(tmp_path, backend)


PDSH = """#!{python}
import os, pathlib, sys
sys.path.insert(0, {modules!r})
import multi_node
line = " ".join(sys.argv[sys.argv.index("-w") + 2 :])
commands = [["bash", "-c", line.replace("%n", str(rank))] for rank in (0, 1)]
logs = [pathlib.Path({logs!r}) / f"node{{rank}}.log" for rank in (0, 1)]
sys.exit(max(multi_node.run(commands, {{"PATH": os.environ["PATH"]}}, logs, seconds=900)))
"""
"""What pdsh does, on two nodes of this machine; as over ssh, they get no variables but what stands in the line."""


@needs_nodes
@deepspeed
def test_deepspeeds_launcher_reaches_the_machines_of_the_hostfile(tiny_llama, tmp_path):
    """The header's command with the hostfile, two processes instead of sixteen."""
    programs, config = tmp_path / "bin", alone_and_together(tiny_llama, tmp_path)
    programs.mkdir()
    modules = str(ROOT / "eval" / "backends")
    fakes = {"pdsh": PDSH.format(python=sys.executable, modules=modules, logs=str(tmp_path)), "ssh": "#!/bin/sh\n"}
    for name, text in fakes.items():
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    words = first_command("zero2_nodes.yaml", "pdsh").words
    at = words.index("recipes/train_mtl15.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", *words[2:at], "--num_processes", "2"]
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    surroundings = launching.environment("zero2_nodes.yaml") | {
        "PATH": path,
        "DS_ENV_FILE": str(tmp_path / "variables"),
    }
    command += [RECIPE, *flags(config)]
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False)
    said = "\n".join(log.read_text(encoding="utf-8") for log in tmp_path.glob("node*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + said
    assert_same(tmp_path, "ZeRO-2")


# --- Slurm ------------------------------------------------------------------------------------------------

FAKES = {
    # A node after the other, each with its number, as Slurm starts a task on each.
    "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\n'
            'for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" || code=$?; done\nexit ${code:-0}',
    "scontrol": 'if [ "$1" = show ]; then printf "first\\nsecond\\n"; else echo "$@" > "$STORY/scontrol"; fi',
    "accelerate": 'echo "$@" >> "$STORY/accelerate"\n'
                  'if [ -n "${STOPPED:-}" ]; then mkdir -p "$OUTPUT/sst2"; touch "$OUTPUT/sst2/PREEMPTED"; fi\n'
                  'exit "${CODE:-0}"',
}  # fmt: skip
"""What Slurm and the launcher do, as far as the script sees it."""


def submitted(tmp_path: Path, nodes: int = 2, **variables: str) -> tuple[int, list[str], str]:
    """Exit code of launch.slurm, what each node's launcher was told, and what became of the job."""
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name, body in FAKES.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    for name in ("accelerate", "scontrol"):
        (tmp_path / name).unlink(missing_ok=True)
    job = {"SLURM_JOB_ID": "12345", "SLURM_NNODES": str(nodes), "SLURM_JOB_NODELIST": "x", "SLURM_GPUS_ON_NODE": "4"}
    surroundings = os.environ | job | {"PATH": f"{programs}:{os.environ['PATH']}", "STORY": str(tmp_path)}
    surroundings |= {"OUTPUT": str(tmp_path / "out")} | variables
    script = ["bash", CONFIGS / "launch.slurm", "recipes/train_mtl15.py", "--tasks", "sst2"]
    done = subprocess.run(script, cwd=ROOT, env=surroundings, capture_output=True, text=True, check=False)
    told = (tmp_path / "accelerate").read_text(encoding="utf-8").splitlines()
    requeued = tmp_path / "scontrol"
    return done.returncode, told, requeued.read_text(encoding="utf-8") if requeued.exists() else ""


def test_slurm_starts_a_launcher_a_node(tmp_path):
    """Accelerate's parser takes what it is told, each node has its number, and one node needs no meeting place."""
    code, told, requeued = submitted(tmp_path)
    assert (code, requeued) == (0, "")
    for rank, line in enumerate(told):
        args = launch_command_parser().parse_args(line.split()[1:])
        assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 8, rank)
        assert (args.rdzv_backend, args.main_process_ip, args.main_process_port) == ("c10d", "first", 22345)
        assert args.config_file == "accelerate_configs/ddp.yaml" and args.training_script == "recipes/train_mtl15.py"
        output = str(tmp_path / "out")
        assert args.training_script_args == ["--tasks", "sst2", "--output_dir", output,
                                             "--resume_from_checkpoint", "latest"]  # fmt: skip
    assert len(told) == 2
    (alone,) = submitted(tmp_path, nodes=1, CONFIG="zero3.yaml")[1]
    args = launch_command_parser().parse_args(alone.split()[1:])
    assert (args.num_machines, args.num_processes, args.rdzv_backend) == (1, 4, "static")
    assert args.config_file == "accelerate_configs/zero3.yaml"


def test_slurm_requeues_what_was_preempted(tmp_path):
    """By the file, since a launcher ends with 1 in any case; one of an earlier start requeues nothing."""
    assert submitted(tmp_path, CODE="1", STOPPED="yes")[::2] == (0, "requeue 12345\n")
    assert (tmp_path / "out" / "sst2" / "PREEMPTED").exists()
    assert submitted(tmp_path, CODE="1")[::2] == (1, "")
