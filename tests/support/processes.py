"""Processes that run Python code, without waiting for the import of torch every time.

What a test lets another process do, and needs nothing of the test for, is done ahead: one thread
waits for such processes while the tests before it run, which mostly keep one core busy.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]

# Forks before anything of ours is imported, and before torch has computed anything. The code is the
# child's `__main__`, and its end that of the interpreter.
_SERVER = """
import json, os, sys
import torch, torchvision
for line in iter(sys.stdin.readline, ""):
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    os._exit(0)
for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, request["stdout"], os.O_WRONLY),
                            (2, request["stderr"], os.O_WRONLY)):
    os.dup2(os.open(path, flags), number)
os.environ.clear()
os.environ.update(request["environment"])
code = compile(request["code"], "<string>", "exec")
for name in [name for name in globals() if not name.startswith("__") and name != "code"]:
    del globals()[name]
exec(globals().pop("code"))
"""
# What nobody has read by then.
_LATER = ("FUSED_RESNET_", "ONEDNN_", "PYTEST_")


class _Server:
    """The process that forks, with the environment it has started with."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=TESTS,
            env=environment,
        )
        self.unread = b""
        self.child: int | None = None
        atexit.register(self.close)

    def close(self) -> None:
        if self.child is not None:
            os.kill(self.child, signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait()

    def can_run(self, environment: dict[str, str]) -> bool:
        if self.process.poll() is not None:
            return False
        differing = set(environment.items()) ^ set(self.environment.items())
        return all(name.startswith(_LATER) for name, _ in differing)

    def run(self, code: str, timeout: float, environment: dict[str, str]) -> tuple[int, str, str]:
        with contextlib.ExitStack() as stack:
            out, err = (
                stack.enter_context(tempfile.NamedTemporaryFile("r", errors="replace"))
                for _ in range(2)
            )
            request = {
                "code": code,
                "environment": environment,
                "stdout": out.name,
                "stderr": err.name,
            }
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.child = self.number(None)
            try:
                return self.number(timeout), out.read(), err.read()
            except TimeoutError:
                os.kill(self.child, signal.SIGKILL)
                self.number(None)
                raise subprocess.TimeoutExpired(code, timeout) from None
            finally:
                self.child = None

    def number(self, timeout: float | None) -> int:
        """The next line of the process: a child, or what it ended with."""
        while b"\n" not in self.unread:
            if not select.select([self.process.stdout], [], [], timeout)[0]:
                raise TimeoutError
            data = os.read(self.process.stdout.fileno(), 4096)
            assert data, "the process that forks is gone"
            self.unread += data
        line, _, self.unread = self.unread.partition(b"\n")
        return int(line)


# By the thread that they work for and what Triton, imported with torch, does with kernels.
_servers: dict[tuple[int, str | None], _Server] = {}


def run_code(code: str, timeout: float, environment: dict[str, str]) -> tuple[int, str, str]:
    """Runs `code` in a process of its own, in the tests' folder: exit status, output and errors.

    Modules of torch and torchvision are there already; nothing of fused_resnet is. Where the
    environment has what is read earlier than that, the process is an interpreter of its own.

    Args:
        code: of the process's `__main__`.
        timeout: in seconds.
        environment: all of it.

    Raises:
        subprocess.TimeoutExpired: after the process has been killed.
    """
    interpret = {k: v for k, v in environment.items() if k == "TRITON_INTERPRET"}
    key = (threading.get_ident(), interpret.get("TRITON_INTERPRET"))
    if key not in _servers and hasattr(os, "fork"):
        _servers[key] = _Server({**current_environment(), **interpret})
    if key in _servers and _servers[key].can_run(environment):
        return _servers[key].run(code, timeout, environment)
    return run_command([sys.executable, "-c", code], timeout, environment, TESTS)


def run_command(
    command: Sequence[str | Path], timeout: float, environment: dict[str, str], folder: Path
) -> tuple[int, str, str]:
    """Runs a command in `folder`: its exit status, output and errors.

    Raises:
        subprocess.TimeoutExpired: after the process has been killed.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=folder,
    )
    _commands.add(process)
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    finally:
        _commands.discard(process)
    return process.returncode, out, err


_commands: set[subprocess.Popen[str]] = set()
_at_start: dict[str, str] = {}
_ahead: dict[object, Future[Any]] = {}
_pool: list[ThreadPoolExecutor] = []


def current_environment() -> dict[str, str]:
    """The environment: ahead of a test that of the start, whatever tests have changed since."""
    if threading.current_thread() is threading.main_thread() or not _at_start:
        return dict(os.environ)
    return dict(_at_start)


def start_ahead(tasks: dict[object, Callable[[], Any]]) -> None:
    """Calls functions, which only wait for processes, one after another in another thread."""
    _at_start.update(os.environ)
    _pool.append(ThreadPoolExecutor(1))
    _ahead.update({key: _pool[0].submit(task) for key, task in tasks.items()})


def result_of(key: object, task: Callable[[], Any]) -> Any:
    """What a task that may have been started ahead returns, or raises.

    One that the other thread has not come to is called here and now.
    """
    future = _ahead.pop(key, None)
    if future is None or future.cancel():
        return task()
    return future.result()


def stop() -> None:
    """Ends what was started ahead and nobody has asked for."""
    for pool in _pool:
        pool.shutdown(wait=False, cancel_futures=True)
    for process in list(_commands):
        process.kill()
    for key in list(_servers):
        server = _servers.pop(key)
        atexit.unregister(server.close)
        server.close()
    for pool in _pool:
        pool.shutdown()
    _pool.clear()
