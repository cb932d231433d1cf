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
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]

# Forks before anything of ours is imported, and before torch has computed anything: a process that
# waits, whose memory is this one's, and of that the child. The code is the child's `__main__`, and
# its end that of the interpreter.
_SERVER = """
import json, os, signal, socket
import torch, torchvision
requests = socket.socket(fileno=0)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait
while files := socket.recv_fds(requests, 1, 4)[1]:
    if os.fork() == 0:
        break
    for file in files:
        os.close(file)
else:
    os._exit(0)
signal.signal(signal.SIGCHLD, signal.SIG_DFL)
request, out, err, status = files
child = os.fork()
if child:
    os.write(status, b"%d\\n" % child)
    os.write(status, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)
with open(request) as file:
    request = json.load(file)
requests.detach()
for number, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, err)):
    os.dup2(file, number)
    os.close(file)
os.close(status)
os.environ.clear()
os.environ.update(request["environment"])
code = compile(request["code"], "<string>", "exec")
for name in [name for name in globals() if not name.startswith("__") and name != "code"]:
    del globals()[name]
exec(globals().pop("code"))
"""
# What nobody has read by then. The last two torch sets itself, once it has compiled anything.
_LATER = (
    "FUSED_RESNET_",
    "ONEDNN_",
    "PYTEST_",
    "TORCHINDUCTOR_CACHE_DIR",
    "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR",
)


class _Server:
    """The process that forks, with the environment it has started with."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.requests, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its_end:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _SERVER], stdin=its_end, cwd=TESTS, env=environment
            )
        self.children: set[int] = set()
        atexit.register(self.close)

    def close(self) -> None:
        for child in list(self.children):
            os.kill(child, signal.SIGKILL)
        self.requests.close()
        self.process.wait()

    def can_run(self, environment: dict[str, str]) -> bool:
        if self.process.poll() is not None:
            return False
        differing = set(environment.items()) ^ set(self.environment.items())
        return all(name.startswith(_LATER) for name, _ in differing)

    def run(self, code: str, timeout: float, environment: dict[str, str]) -> tuple[int, str, str]:
        with contextlib.ExitStack() as stack:
            request, out, err = (
                stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
                for _ in range(3)
            )
            json.dump({"code": code, "environment": environment}, request)
            request.seek(0)
            reading, writing = os.pipe()
            status = stack.enter_context(open(reading, "rb", buffering=0))
            with open(writing, "wb") as end:
                files = [file.fileno() for file in (request, out, err, end)]
                socket.send_fds(self.requests, [b"r"], files)
            child = _number(status, None)
            self.children.add(child)
            try:
                code_of_exit = _number(status, timeout)
            except BaseException as error:
                os.kill(child, signal.SIGKILL)
                if not isinstance(error, TimeoutError):
                    raise
                _number(status, None)
                raise subprocess.TimeoutExpired(code, timeout) from None
            finally:
                self.children.discard(child)
            for file in (out, err):
                file.seek(0)
            return code_of_exit, out.read(), err.read()


def _number(status: FileIO, timeout: float | None) -> int:
    """The next line that the waiting process writes: a child, or what it ended with."""
    line = b""
    while not line.endswith(b"\n"):
        if not select.select([status], [], [], timeout)[0]:
            raise TimeoutError
        byte = status.read(1)
        assert byte, "the process that forks is gone"
        line += byte
    return int(line)


# By what Triton, imported with torch, does with kernels. An import of torch takes 0.4 GB, which all
# that is forked of a process shares.
_servers: dict[str | None, _Server] = {}
_lock = threading.Lock()


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
    key = interpret.get("TRITON_INTERPRET")
    with _lock:
        if key not in _servers and hasattr(os, "fork"):
            _servers[key] = _Server({**current_environment(), **interpret})
        server = _servers.get(key)
    if server is not None and server.can_run(environment):
        return server.run(code, timeout, environment)
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
