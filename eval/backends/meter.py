"""Run a recipe, and note what each of its optimizer steps takes.

    accelerate launch ... eval/backends/meter.py FOLDER recipes/train_mtl15.py --tasks sst2

Every process writes FOLDER/rank-<rank>.json: what it saw at the start of each step (`ticks`: wall clock and CPU time in
seconds, bytes sent so far in its network namespace, over the loopback too), and its peak resident memory in bytes. A
step draws its mask first, so the drawing is where the clock is read.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path

from copra_llm import train
from copra_llm.results import peak_memory_bytes

NETWORK = "/proc/self/ns/net"
"""The same file for all processes of a network namespace."""


def sent_bytes() -> int:
    """By all interfaces of this process's network namespace, with the headers of TCP and IP; 0 where it has none."""
    counters = Path("/proc/self/net/dev")
    lines = counters.read_text(encoding="utf-8").splitlines()[2:] if counters.exists() else []
    return sum(int(line.split(":")[1].split()[8]) for line in lines)


def tick() -> tuple[float, float, int]:
    return time.perf_counter(), time.process_time(), sent_bytes()


def main() -> None:
    folder, recipe, *argv = sys.argv[1:]
    ticks, draw = [], train.sample_mask

    def timed(*args, **kwargs):
        ticks.append(tick())
        return draw(*args, **kwargs)

    train.sample_mask = timed
    sys.argv = [recipe, *argv]
    try:
        runpy.run_path(recipe, run_name="__main__")
    finally:
        seen = {"ticks": ticks, "peak_memory_bytes": peak_memory_bytes(),
                "network": os.stat(NETWORK).st_ino if os.path.exists(NETWORK) else 0}  # fmt: skip
        path = Path(folder) / f"rank-{os.environ.get('RANK', '0')}.json"
        path.write_text(json.dumps(seen) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
