"""Arguments of the benchmarks, and bench/on_gpu.sh."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import Run, processes
from support.results import ROOT
from support.results_schema import check_kernels_document


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("kernels", "--model", "vgg16"), ("vgg16", "resnet50")),
        (("kernels", "--batch", "1,x"), ("--batch", "'x'")),
        (("kernels", "--dtype", "float64"), ("--dtype", "float64", "bfloat16")),
        (("kernels", "--device", "tpu"), ("--device", "tpu")),
        (("kernels", "--backend", "magic"), ("--backend", "magic", "triton")),
        (("kernels", "--layers", "11x11"), ("--layers", "11x11", "3x3")),
        (("kernels", "--without", "magic"), ("--without", "magic", "oneDNN, fused")),
        (("kernels", "--rounds", "0"), ("--rounds", "0")),
        (("kernels", "--json", "no/such/a.json"), ("--json", "no folder")),
        (("models", "--mode", "guessing"), ("--mode", "guessing", "training")),
        (("models", "--dtype", "int4"), ("--dtype", "int4")),
        (("models", "--without", "eager"), ("--without", "eager")),
        (("report", "--output", "no/such/a.html"), ("--output", "no folder")),
        (("report", "nothing.json"), ("nothing.json", "cannot be read")),
        (("magic",), ("magic",)),
    ],
)
def test_bad_arguments_get_one_line(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], parts: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    extra = ("--device", "cpu") if arguments[0] in ("kernels", "models") else ()
    code, out, err = run("bench", arguments[0], *extra, *arguments[1:])
    assert (code, out, err.count("\n")) == (2, "", 1), (out, err)
    for part in parts:
        assert part in err


STUB = """#!/bin/bash
# Stands in for python: writes down what it was asked, and fails where it is told to.
echo "${@:3}" >> "$STUB_LOG"
sleep "${STUB_SLEEPS:-0}"
if [[ -n ${STUB_FAILS:-} && "${@:3}" =~ $STUB_FAILS ]]; then exit 3; fi
if [[ "${@:3}" =~ --json\\ ([^ ]+) ]]; then echo '{}' > "${BASH_REMATCH[1]}"; fi
"""


def on_gpu(tmp_path: Path, **settings: str) -> tuple[int, str, list[str]]:
    """Runs the script with a stub for python: exit code, output, commands."""
    stub, log = tmp_path / "python", tmp_path / "log"
    stub.write_text(STUB)
    stub.chmod(0o755)
    log.write_text("")
    process = subprocess.run(
        ["bash", str(ROOT / "bench" / "on_gpu.sh"), str(tmp_path / "results")],
        capture_output=True, text=True, timeout=120,
        env={
            **os.environ, "PYTHON": str(stub), "WHEEL": "none", "DEVICE": "cpu",
            "STUB_LOG": str(log), "MODELS": "resnet50,resnet18", "BATCHES": "1,8", **settings,
        },
    )  # fmt: skip
    return process.returncode, process.stdout, log.read_text().splitlines()


def test_on_gpu_runs_in_order_of_value_and_resumes(tmp_path: Path) -> None:
    code, out, commands = on_gpu(tmp_path, STUB_FAILS="^pytest|tune resnet18")
    assert code == 1
    order = ["doctor", "compare resnet18", "bench kernels", "pytest", "bench models", "tune",
             "bench kernels", "bench models", "--mode training", "--mode training",
             "bench report"]  # fmt: skip
    at = -1
    for part in order:
        at = next(i for i, line in enumerate(commands) if i > at and part in line)
    assert re.search(r"FAILED \(3\) +\d+ s  tests\n", out)
    assert re.search(r"ok +\d+ s  kernels-resnet50-float32\n", out)
    # Again: only what failed, and the report.
    code, out, commands = on_gpu(tmp_path)
    assert code == 0
    assert [line.split()[1:3] for line in commands if not line.startswith("pytest")] == [
        ["tune", "resnet18"],
        ["bench", "report"],
    ]
    assert any(line.startswith("pytest") for line in commands)
    assert re.search(r"done before +\d+ s  doctor\n", out)
    # No time left: nothing starts, and it says so.
    code, out, commands = on_gpu(tmp_path, AGAIN="1", TOTAL="-1")
    assert (code, commands) == (1, [])
    assert "no time left" in out


def test_on_gpu_ends_a_step_that_takes_too_long(tmp_path: Path) -> None:
    code, out, commands = on_gpu(tmp_path, ONLY="^smoke$", LIMIT="1", STUB_SLEEPS="30")
    assert code == 1
    assert len(commands) == 1
    assert "out of time" in out


def rehearsal() -> tuple[int, str, dict[str, Any], str]:
    """Exit code and output of bench/on_gpu.sh, and the files that it has written."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {
            **processes.current_environment(), "PYTHON": sys.executable, "WHEEL": "none",
            "DEVICE": "cpu", "MODELS": "resnet18", "BATCHES": "1", "ROUNDS": "1",
            "ONLY": "kernels-first|report", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }  # fmt: skip
        command = ["bash", str(ROOT / "bench" / "on_gpu.sh"), name]
        status, out, err = processes.run_command(command, 600, environment, processes.TESTS)
        written = folder / "kernels-first.json", folder / "report.html"
        if status != 0 or not all(path.is_file() for path in written):
            return status, out + err, {}, ""
        return status, out + err, json.loads(written[0].read_text()), written[1].read_text()


@pytest.mark.slow
@pytest.mark.ahead(lambda: rehearsal())
def test_on_gpu_rehearses_with_the_real_commands(ahead: Callable[[], Any]) -> None:
    status, said, kernels, report = ahead()
    assert status == 0, said
    check_kernels_document(kernels)
    assert "<img" in report
