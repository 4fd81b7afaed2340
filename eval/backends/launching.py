"""How is a launch configuration started on a machine without GPUs?

By the command of its header; what a CPU needs in addition stands here: fewer processes, a free port, and the variables
that put the computation on the CPU. Where network namespaces can be made, a run has a network of its own: its ports
are free, its bytes can be counted, and of two machines each is a node.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import multi_node
import yaml

from copra_llm.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "accelerate_configs"
SECONDS = 1500
"""Until a launch that has not ended counts as hanging; DeepSpeed's first one compiles for some minutes."""
CPU = {
    "NO": {"ACCELERATE_USE_CPU": "true"},
    "MULTI_GPU": {"ACCELERATE_USE_CPU": "true"},
    "FSDP": {"ACCELERATE_USE_CPU": "true"},
    "DEEPSPEED": {"DS_ACCELERATOR": "cpu"},
}
"""By Accelerate's name of the backend: the variables without which a process would look for a GPU, or not be parted."""


def environment(config: str, on_gpus: bool = False) -> dict[str, str]:
    """Of a launch; one thread a process, so that all add in the same order."""
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if on_gpus:
        return surroundings
    kind = yaml.safe_load((CONFIGS / config).read_text(encoding="utf-8"))["distributed_type"]
    return surroundings | CPU[kind]


def launch(
    config: str,
    flags: Sequence[str],
    script: Sequence[str],
    logs: Path,
    processes: int = 2,
    nodes: int = 1,
    on_gpus: bool = False,
) -> list[int]:
    """Start a script by `accelerate launch`; the exit codes of the launchers, one a node.

    Args:
        config: file of accelerate_configs/.
        flags: further ones of `accelerate launch`; {rank} stands for the node's number.
        script: with its arguments.
        logs: folder for what the nodes print.
        processes: in all.
        nodes: 1 or 2; two have the names node0 and node1.
        on_gpus: and not on CPUs.

    Raises:
        InputError: for two nodes where none can be made.
        subprocess.TimeoutExpired: if it hangs; its processes are killed.
    """
    where = ["--main_process_port", "29500"] if nodes == 2 else ["--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    command += ["--num_processes", str(processes), *where, *flags, *map(str, script)]
    commands = [[word.replace("{rank}", str(rank)) for word in command] for rank in range(nodes)]
    logs.mkdir(parents=True, exist_ok=True)
    files = [logs / f"node{rank}.log" for rank in range(nodes)]
    surroundings = environment(config, on_gpus)
    reason = multi_node.why_not()
    if reason is None:
        return multi_node.run(commands, surroundings, files, SECONDS)
    if nodes > 1:
        raise InputError(f"{nodes} nodes were asked for, but there are {reason}")
    with open(files[0], "w", encoding="utf-8") as said:
        done = subprocess.run(commands[0], env=surroundings, stdout=said, stderr=said, timeout=SECONDS, check=False)
    return [done.returncode]
