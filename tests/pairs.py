"""Training on two gloo processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT

RECIPE = ROOT / "recipes" / "train_mtl15.py"
SECONDS = 900
"""Until a process that has not ended counts as hanging; they take a few on a machine that does nothing else."""


ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false", "DS_ACCELERATOR": "cpu"}
BACKENDS = {
    "ddp": {"ACCELERATE_USE_CPU": "true"},
    "fsdp2": {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero1": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
    "zero2": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
    "zero3-init": ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"},
}
"""What `accelerate launch` would put into the environment of a process, by backend."""


def environment(rank: int, port: int, backend: str) -> dict[str, str]:
    """What torchrun would tell a process, and `accelerate launch` beside it."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            **BACKENDS[backend]}  # fmt: skip


def run_rank(rank: int, port: int, argv: list, log: Path, prepare: Callable[[int], None] | None, backend: str) -> None:
    """The recipe as one of the two processes; what it prints goes into its log."""
    os.environ.update(environment(rank, port, backend))
    with open(log, "w", encoding="utf-8") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    if prepare is not None:
        prepare(rank)
    if isinstance(argv[0], list):
        sys.exit(run_recipes(argv))
    sys.argv = [str(RECIPE), *argv]
    runpy.run_path(str(RECIPE), run_name="__main__")


def run_recipes(argvs: list[list[str]]) -> int:
    """Recipes one after the other in this process, until one fails; conversations have a recipe of their own."""
    for argv in argvs:
        recipe = RECIPE.with_name("train_instruct.py") if "--dataset_name" in argv else RECIPE
        if code := runpy.run_path(str(recipe))["main"](argv):
            return code
    return 0


class Pair:
    """The recipe on two processes, forked from a server that has imported the libraries.

    Args:
        argv: its command line; or several, one after the other in the same processes.
        logs: folder for what they print.
        prepare: called in each process with its rank; from a module that can be imported.
        backend: one of `BACKENDS`.
    """

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["copra_llm.train"])

    def __init__(self, argv: list, logs: Path, prepare: Callable[[int], None] | None = None, backend: str = "ddp"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"rank{rank}.log" for rank in (0, 1)]
        self.ranks = [
            self.context.Process(target=run_rank, args=(rank, port, argv, self.logs[rank], prepare, backend))
            for rank in (0, 1)
        ]
        for process in self.ranks:
            process.start()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *exception) -> None:
        for process in self.ranks:
            with contextlib.suppress(ValueError):
                process.kill()
            process.join()

    def said(self) -> str:
        return "\n".join(log.read_text(encoding="utf-8") for log in self.logs if log.exists())

    def wait_until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert all(process.is_alive() for process in self.ranks), self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.002)

    def join(self, seconds: float = SECONDS) -> list[int]:
        """Exit codes of rank 0 and 1."""
        end = time.monotonic() + seconds
        for process in self.ranks:
            process.join(max(0.0, end - time.monotonic()))
            assert process.exitcode is not None, f"hangs: {self.said()}"
        return [process.exitcode for process in self.ranks]
