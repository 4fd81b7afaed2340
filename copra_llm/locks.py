"""Who else is writing into this folder?

A run holds an flock on `.lock` in its folder. The kernel releases it when the process ends, however it ends, so what a
dead run has left behind stops nobody: the file may stay, and the next run takes it over. It is removed when a run ends
in order. Where the file system knows no locks, that is said, and the run goes on without.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path

from copra_llm.errors import InputError
from copra_llm.results import naming

LOCK = ".lock"

_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
_held: set[int] = set()
"""File descriptors of the locks that this process holds."""


class FolderLock:
    """A folder for one process at a time.

    Args:
        folder: made if it is not there, and removed again on release if nothing was written into it.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = Path(folder), Path(folder) / LOCK
        self._file: int | None = None
        self._made: list[Path] = []

    def take(self) -> bool:
        """Lock the folder; False where its file system cannot.

        Raises:
            InputError: if another process holds it.
            OSError: if the folder cannot be made or written.
        """
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return self._lock()
        except BaseException:
            self._remove_empty()
            raise

    def _lock(self) -> bool:
        while self._file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A run that ended meanwhile has removed this very file: a lock on it would be no lock.
                if _same_file(file, self.path):
                    self._file = file
            except BlockingIOError:
                raise InputError(f"{self.folder} is in use by {_holder(file)}; wait until it has ended, or give "
                                 "another --output_dir") from None  # fmt: skip
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                print(f"warning: {self.folder} cannot be locked ({error.strerror}); take care that no other run "
                      "writes there", file=sys.stderr)  # fmt: skip
                self.path.unlink(missing_ok=True)
                return False
            finally:
                if self._file is None:
                    os.close(file)
        _let_go_in_children()
        _held.add(self._file)
        with naming(self.path):
            _write_holder(self._file)
        return True

    def release(self) -> None:
        """Give the folder back; nothing to do where this process does not hold it."""
        if self._file in _held:
            self.path.unlink(missing_ok=True)
            _held.remove(self._file)
            os.close(self._file)
        self._file = None
        self._remove_empty()

    def _remove_empty(self) -> None:
        for path in self._made:
            with contextlib.suppress(OSError):
                path.rmdir()
        self._made = []


def _write_holder(file: int) -> None:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    os.ftruncate(file, 0)
    os.pwrite(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode(), 0)


def _holder(file: int) -> str:
    try:
        holder = json.loads(os.pread(file, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):  # it has just taken the lock, and not written yet
        return "another process"


def _same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


@functools.cache
def _let_go_in_children() -> None:
    """A forked child shares its parent's lock, and one that outlives it, as a loader's may, would keep it."""
    os.register_at_fork(after_in_child=_close_all)


def _close_all() -> None:
    for file in _held:
        os.close(file)
    _held.clear()
