"""Processes that run Python code, without waiting for the import of torch every time."""

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
from pathlib import Path

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

    def __init__(self) -> None:
        self.environment = dict(os.environ)
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=TESTS,
        )
        self.unread = b""
        atexit.register(self.close)

    def close(self) -> None:
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
            child = self.number(None)
            try:
                return self.number(timeout), out.read(), err.read()
            except TimeoutError:
                os.kill(child, signal.SIGKILL)
                self.number(None)
                raise subprocess.TimeoutExpired(code, timeout) from None

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


_servers: list[_Server] = []


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
    if not _servers and hasattr(os, "fork"):
        _servers.append(_Server())
    if _servers and _servers[0].can_run(environment):
        return _servers[0].run(code, timeout, environment)
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        cwd=TESTS,
    )
    return result.returncode, result.stdout, result.stderr
