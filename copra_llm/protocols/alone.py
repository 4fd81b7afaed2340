"""What does a measurement say that has a process to itself?

Peak memory is that of a process, and settings such as the number of threads or how the C library gives memory back are
read when it starts. So a script starts itself anew, as a worker that writes its answer as a line of JSON; all else that
it writes is for whoever waits.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from copra_llm.errors import InputError

GIVEN_BACK = 65536
"""Bytes from which on a block is given back."""


def alone(
    script: Path,
    arguments: Sequence[str],
    threads: int = 1,
    give_back: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Any:
    """What a worker answers.

    Args:
        script: a Python file.
        arguments: its command line.
        threads: of the worker's computation.
        give_back: whether freed memory goes back to the system at once (glibc), so that resident memory is memory in
            use; it costs time.
        say: gets each line that is not JSON, as it comes.

    Returns:
        The last line that is JSON.

    Raises:
        InputError: if the worker fails, or gives no answer; the last line of its errors is in the sentence.
    """
    own = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    if give_back:
        own["MALLOC_MMAP_THRESHOLD_"] = str(GIVEN_BACK)
    command, answers = [sys.executable, str(script), *arguments], []
    # Errors go to a file: read from a pipe after the output, they could fill it and stop the worker.
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        with subprocess.Popen(
            command, env=os.environ | own, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
        ) as worker:
            for line in worker.stdout:
                try:
                    answers.append(json.loads(line))
                except ValueError:
                    say(line.rstrip("\n"))
        errors.seek(0)
        said = errors.read().strip().splitlines()
    if worker.returncode or not answers:
        why = said[-1] if said else f"exit code {worker.returncode} and no answer"
        raise InputError(f"{script.name} {' '.join(arguments)[:200]} stopped with: {why}")
    return answers[-1]
