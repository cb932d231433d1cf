"""Files that several processes may write: replaced whole, one writer at a time."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where only the last of two writers at once is kept
    fcntl = None  # type: ignore[assignment]  # whoever uses it asks first


def replace(path: Path, data: bytes) -> None:
    """Writes a file in one step, complete or not at all; of a link, the file it leads to.

    What is no regular file, such as /dev/stdout, is written to.

    Raises:
        OSError: the file cannot be written; it stays as it was.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            path.write_bytes(data)
            return
    target = Path(os.path.realpath(path))
    # Short, so that no name is too long that is not too long itself.
    partial = target.with_name(f".{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


@contextlib.contextmanager
def locked(path: Path, timeout: float) -> Iterator[None]:
    """Holds the lock that is the file `path`, made where it is not; it ends with the process.

    Raises:
        OSError: the file cannot be made.
        TimeoutError: another process kept the lock for `timeout` seconds.
    """
    with open(path, "a") as file:
        if fcntl is not None:
            _wait_for(file.fileno(), path, timeout)
        yield


def _wait_for(handle: int, path: Path, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the lock {path} was taken for {timeout:.0f} seconds") from None
            time.sleep(0.01)
