"""What the commands share: options, checks of arguments, texts."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..measure.errors import InvalidArgumentError
from ..measure.inputs import known_models
from ..measure.text import visible


def whole_number(help: str) -> Any:
    """An integer option; typer's own names the option but not always the value it was given."""

    def parse(text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not an integer") from None

    return typer.Option(help=help, parser=parse, metavar="N")


def check_output(name: str, path: Path | None) -> None:
    """Fails before the measuring, not after it."""
    if path is None:
        return
    folder = path.parent
    if not folder.is_dir():
        raise InvalidArgumentError(
            f"--{name} is {str(path)!r}, but there is no folder {str(folder)!r}"
        )
    if path.is_dir():
        raise InvalidArgumentError(f"--{name} is {str(path)!r}, which is a folder, must be a file")
    # A link's target is replaced, which takes writing to its folder.
    target = Path(os.path.realpath(path))
    regular = target.is_file() or not target.exists()
    needed = [target.parent, target] if regular else [path]
    if not all(os.access(one, os.W_OK) for one in needed if one.exists()):
        raise InvalidArgumentError(f"--{name} is {str(path)!r}, which cannot be written")


def check_model(name: str) -> None:
    """Raises InvalidArgumentError unless torchvision has such a residual network."""
    if name not in known_models():
        raise InvalidArgumentError(f"MODEL is {name!r}, must be one of {', '.join(known_models())}")


def batch_size(text: str) -> int:
    """One of the numbers that --batch lists."""
    try:
        count = int(text)
    except ValueError:
        raise InvalidArgumentError(f"--batch has {text!r}, which is not an integer") from None
    if count < 1:
        raise InvalidArgumentError(f"--batch has {count}, must be at least 1")
    return count


def fail(message: str, code: int) -> int:
    """Prints an error's one line; returns the exit code."""
    print(f"fused-resnet: {visible(message)}", file=sys.stderr)
    return code


def progress_bar() -> Progress:
    """A bar on standard error with the time left, shown where that is a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
