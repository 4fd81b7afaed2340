"""How do the processes of a run come to one view?

What the file system, a signal or a death tells, it tells one process first. If that one stopped alone, the others would
wait for it in the next exchange.

    what the main process reads, writes or refuses    its result, or its error, is broadcast: `on_main`
    SIGTERM, which reaches them at different times    the flags are reduced after every step: `sigterm`
    a process that is gone or hangs                   the exchange fails, at once or after a time: `lost_processes`
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import distributed

from copra_llm.errors import InputError, LostProcess, ToldElsewhere

T = TypeVar("T")


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Call something on the main process alone, and return on every process what it returns, once it has.

    Raises:
        InputError, OSError: those of the call, on the main process.
        ToldElsewhere: on the others, if the call has raised one of them.
    """
    if accelerator.num_processes == 1:
        return action()
    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = action()
        except (InputError, OSError) as raised:
            error = raised
    result, refused = broadcast_object_list([result, error is not None])
    if error is not None:
        raise error
    if refused:
        raise ToldElsewhere
    return result


@contextlib.contextmanager
def sigterm(accelerator: Accelerator, timeout: float) -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether SIGTERM has come to any process; all must ask, and hear the same.

    Asked after every step, since what announces the end may leave half a minute. Several processes agree in a group of
    their own on the CPUs: nobody waits for a device, and a process that is gone is noticed there even where the
    devices' own exchange would wait for it. Only the main thread can listen for a signal.

    Args:
        accelerator: knows the processes.
        timeout: seconds to wait for the others.
    """
    received: list[int] = []
    try:
        before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    except ValueError:
        before = None
    group = None
    if accelerator.num_processes > 1:
        group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def asked_to_stop() -> bool:
        if group is None:
            return bool(received)
        flag = torch.tensor(float(bool(received)))
        distributed.all_reduce(flag, distributed.ReduceOp.MAX, group)
        return bool(flag)

    try:
        yield asked_to_stop
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    if group is not None:
        distributed.destroy_process_group(group)


_EXCHANGE_FAILED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting",
                    "timed out", "Connection refused")  # fmt: skip


@contextlib.contextmanager
def lost_processes(accelerator: Accelerator) -> Iterator[None]:
    """An exchange that fails for want of another process becomes one sentence.

    Raises:
        LostProcess: in place of what the backend raises.
    """
    try:
        yield
    except RuntimeError as error:
        known = isinstance(error, distributed.DistError) or any(words in str(error) for words in _EXCHANGE_FAILED)
        if accelerator.num_processes == 1 or not known:
            raise
        raise LostProcess("another process of this run has ended or does not answer; when it is clear why, go on with "
                          "--resume_from_checkpoint latest") from error  # fmt: skip
