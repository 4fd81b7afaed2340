"""How are many independent jobs done side by side?

A job is a function and its arguments that leaves records; what has a record is not done again, so a run of jobs can
be killed at any moment and started anew. Each worker is a process of its own with its share of the machine: a GPU,
or an equal part of the CPU threads.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from copra_llm.errors import InputError, Preempted


@dataclass(frozen=True)
class Job:
    """`function(*arguments)`; both must be picklable."""

    name: str
    function: Callable[..., Any]
    arguments: tuple = ()


def run_jobs(
    jobs: Sequence[Job],
    workers: int | None = None,
    say: Callable[[str], None] = print,
    failed: Callable[[Job, Exception], None] | None = None,
) -> list[Any]:
    """Do all jobs; what they return, in their order. The arguments are those of `Workers` and its `run`.

    Raises:
        InputError: if a job's input is wrong, or `workers` is not positive. Jobs in progress are ended.
    """
    with Workers(workers) as own:
        return own.run(jobs, say, failed)


class Workers:
    """Processes that do jobs side by side, list after list; they start with the first list that needs them.

    Leaving the context ends them; with an error, or at SIGTERM, jobs in progress are asked to stop (SIGTERM) and jobs
    that wait are dropped. Starting costs each some seconds of imports, which short lists would pay again and again.

    Args:
        count: processes side by side; 1: this process; None: one a GPU, or one a CPU core where there is none.

    Raises:
        InputError: if `count` is not positive.
    """

    def __init__(self, count: int | None = None):
        self.count = default_workers() if count is None else count
        if self.count < 1:
            raise InputError(f"--workers is {self.count}, but must be at least 1")
        self._open, self._pool = ExitStack(), None

    def __enter__(self) -> Workers:
        self._open.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._open.__exit__(*error)

    def run(
        self,
        jobs: Sequence[Job],
        say: Callable[[str], None] = print,
        failed: Callable[[Job, Exception], None] | None = None,
    ) -> list[Any]:
        """Do all jobs; what they return, in their order.

        Args:
            jobs: independent of each other.
            say: reports each finished job with the time left.
            failed: told of a job that has failed; unless it raises, the others go on, and None stands for what the job
                would have returned. None: the first failure ends all.

        Raises:
            InputError: if a job's input is wrong.
        """
        report = _Report(len(jobs), say, failed)
        if self.count == 1 or len(jobs) < 2:
            return [report.done(job, lambda job=job: job.function(*job.arguments)) for job in jobs]
        pool = self._started()
        futures = {pool.submit(_do, job): job for job in jobs}
        values = {id(futures[future]): report.done(futures[future], future.result) for future in as_completed(futures)}
        return [values[id(job)] for job in jobs]

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            places, stopping = context.Queue(), context.Event()
            for place in range(self.count):
                places.put(place)
            self._pool = self._open.enter_context(
                ProcessPoolExecutor(
                    self.count, mp_context=context, initializer=_settle, initargs=(places, stopping, self.count)
                )
            )
            self._open.enter_context(_ending_workers(self._pool, stopping))
        return self._pool


def default_workers() -> int:
    """One a GPU; one a CPU core this process may use, where there is no GPU."""
    import torch

    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


class _Report:
    """Says what is finished, and when the rest may be."""

    def __init__(self, total: int, say: Callable[[str], None], failed: Callable[[Job, Exception], None] | None = None):
        self.total, self.say, self.failed, self.finished, self.started = total, say, failed, 0, time.time()

    def done(self, job: Job, result: Callable[[], Any]) -> Any:
        """What `result()` gives; None if the job has failed and the others are to go on."""
        try:
            value = result()
        except (Preempted, BrokenExecutor):  # no fault of the job
            raise
        except Exception as error:
            if self.failed is None:
                raise
            self.failed(job, error)
            value = None
        self.finished += 1
        left = (time.time() - self.started) / self.finished * (self.total - self.finished)
        self.say(f"[{self.finished}/{self.total}, some {_span(left)} left] {job.name}")
        return value


def _span(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


_stopping = None
"""In a worker: the event that says that no further job is wanted."""


def _do(job: Job) -> Any:
    # The pool hands a worker its next job before it has finished one, and what was handed over cannot be cancelled.
    if _stopping.is_set():
        return None
    return job.function(*job.arguments)


def _settle(places, stopping, workers: int) -> None:
    """Give a fresh worker its GPU, or its part of the CPU threads."""
    import torch

    global _stopping
    _stopping = stopping
    place = places.get()
    gpus = torch.cuda.device_count()
    if gpus:
        # Before the first use of CUDA in this process, so the device is the only one it will see.
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(place % gpus)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
    # The parent is asked to stop, and asks its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _visible(index: int) -> str:
    outer = os.environ.get("CUDA_VISIBLE_DEVICES")
    return outer.split(",")[index] if outer else str(index)


class _ending_workers:
    """On an error or a signal, jobs that wait are dropped and the workers are asked to stop (SIGTERM), then waited for.

    A training run answers SIGTERM with a checkpoint.
    """

    def __init__(self, pool: ProcessPoolExecutor, stopping):
        self.pool, self.stopping = pool, stopping

    def __enter__(self):
        self.before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))

    def __exit__(self, kind, error, trace):
        signal.signal(signal.SIGTERM, self.before)
        if kind is not None:
            self.stopping.set()
            workers = multiprocessing.active_children()
            self.pool.shutdown(wait=False, cancel_futures=True)
            for process in workers:
                process.terminate()
