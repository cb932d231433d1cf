"""The command `fused-resnet`: parses and prints; `measure/` and `tuning/` do the work."""

from __future__ import annotations

import sys

import torch
import typer

from ..measure.errors import InvalidArgumentError, first_line
from . import bench, compare, doctor, tune
from .console import fail

app = typer.Typer(
    help="Residual networks with fewer passes over memory: compare, tune, bench, see what works.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


for _command in (compare.compare, tune.tune, doctor.doctor):
    app.command()(_command)
app.add_typer(bench.app, name="bench")


# click's class, wherever this version of typer keeps it.
_UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]


def main() -> None:
    """Runs the command; bad arguments end it with one line and exit code 2, Ctrl-C with 130."""
    try:
        code = app(standalone_mode=False)
    except (InvalidArgumentError, _UsageError) as error:
        text = error.format_message() if isinstance(error, _UsageError) else str(error)
        sys.exit(fail(text, 2))
    except (MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(fail(f"out of memory: {first_line(error)}", 1))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(fail("interrupted", 130))
    sys.exit(code if isinstance(code, int) else 0)
