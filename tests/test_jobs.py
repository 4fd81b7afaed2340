"""Jobs side by side: all done, in order, and stopped in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from copra_llm.errors import InputError
from copra_llm.protocols import jobs as jobs_module
from copra_llm.protocols.jobs import Job, Workers, _span, run_jobs

ROOT = Path(__file__).resolve().parents[1]


def square(x: int) -> tuple[int, int, int]:
    import torch

    return x * x, os.getpid(), torch.get_num_threads()


def refuse(folder: Path, place: str) -> None:
    (folder / place).touch()
    raise InputError(f"{place} is wrong; mend it")


@pytest.mark.parametrize("workers", [1, 2])
def test_values_come_in_the_jobs_order(workers):
    said = []
    values = run_jobs([Job(f"job {x}", square, (x,)) for x in range(5)], workers, said.append)
    assert [value for value, *_ in values] == [0, 1, 4, 9, 16]
    assert sorted(line.rsplit("] ", 1)[1] for line in said) == [f"job {x}" for x in range(5)]
    assert said[-1].startswith("[5/5, some 0 min left]")


def test_one_worker_is_this_process_and_two_are_others_that_share_the_threads():
    alone, both = (run_jobs([Job("", square, (x,)) for x in range(4)], n, lambda text: None) for n in (1, 2))
    assert {pid for _, pid, _ in alone} == {os.getpid()}
    assert os.getpid() not in {pid for _, pid, _ in both}
    assert {threads for *_, threads in both} == {max(1, len(os.sched_getaffinity(0)) // 2)}


def test_a_second_list_of_jobs_finds_the_workers_that_the_first_has_started(monkeypatch):
    """And of more than one job alone: a single one is done in this process, by which no worker is started."""
    started, pool = [], jobs_module.ProcessPoolExecutor

    def start(*args, **kwargs):
        started.append(args)
        return pool(*args, **kwargs)

    monkeypatch.setattr(jobs_module, "ProcessPoolExecutor", start)
    with Workers(2) as workers:
        assert [pid for _, pid, _ in workers.run([Job("", square, (1,))], lambda text: None)] == [os.getpid()]
        assert not started
        lists = [workers.run([Job("", square, (x,)) for x in range(4)], lambda text: None) for _ in range(2)]
    assert len(started) == 1
    assert len({pid for values in lists for _, pid, _ in values}) <= 2


@pytest.mark.parametrize("workers", [1, 2])
def test_wrong_input_in_a_job_ends_them_all(tmp_path, workers):
    jobs = [Job("a", refuse, (tmp_path, "a"))] + [Job("b", refuse, (tmp_path, f"b{i}")) for i in range(50)]
    with pytest.raises(InputError, match="is wrong; mend it"):
        run_jobs(jobs, workers, lambda text: None)
    assert len(list(tmp_path.iterdir())) < len(jobs)


def halve(x: int) -> int:
    if x % 2:
        raise InputError(f"{x} is odd; give an even number")
    return x // 2


@pytest.mark.parametrize("workers", [1, 2])
def test_the_others_go_on_where_a_failure_is_only_noted(workers):
    said, failed = [], []

    def note(job: Job, error: Exception) -> None:
        failed.append((job.name, str(error)))

    jobs = [Job(f"job {x}", halve, (x,)) for x in range(6)]
    assert run_jobs(jobs, workers, said.append, note) == [0, None, 1, None, 2, None]
    assert sorted(failed) == [(f"job {x}", f"{x} is odd; give an even number") for x in (1, 3, 5)]
    assert said[-1].startswith("[6/6, some 0 min left]")


@pytest.mark.parametrize("workers", [1, 2])
def test_who_is_told_of_a_failure_can_end_them_all(tmp_path, workers):
    def enough(job: Job, error: Exception) -> None:
        raise InputError(f"{job.name} was one too many; mend it")

    jobs = [Job("a", refuse, (tmp_path, "a"))] + [Job("b", refuse, (tmp_path, f"b{i}")) for i in range(50)]
    with pytest.raises(InputError, match="one too many"):
        run_jobs(jobs, workers, lambda text: None, enough)
    assert len(list(tmp_path.iterdir())) < len(jobs)


def test_no_worker_is_refused():
    with pytest.raises(InputError, match="--workers is 0, but must be at least 1"):
        run_jobs([], 0)


def test_sigterm_reaches_the_workers(tmp_path):
    """They get the time to save what they have, and the process ends with 143."""
    (tmp_path / "slow.py").write_text(
        textwrap.dedent(
            """
            import signal, sys, time
            from pathlib import Path
            from copra_llm.protocols.jobs import Job, run_jobs

            def slow(folder, name):
                def save(number, frame):
                    (folder / f"{name}.saved").touch()
                    sys.exit(1)
                signal.signal(signal.SIGTERM, save)
                (folder / f"{name}.started").touch()
                time.sleep(600)

            if __name__ == "__main__":
                folder = Path(sys.argv[1])
                run_jobs([Job(str(i), slow, (folder, str(i))) for i in range(4)], 2)
            """
        )
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    process = subprocess.Popen([sys.executable, tmp_path / "slow.py", tmp_path], env=env)
    while len(list(tmp_path.glob("*.started"))) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert sorted(f.stem for f in tmp_path.glob("*.saved")) == sorted(f.stem for f in tmp_path.glob("*.started"))


def test_the_time_left_is_readable():
    assert [_span(s) for s in (10, 100, 3600, 9000)] == ["0 min", "2 min", "1 h 0 min", "2 h 30 min"]
