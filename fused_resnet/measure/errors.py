"""Errors of arguments, and the first line of anybody's."""

from __future__ import annotations


class InvalidArgumentError(ValueError):
    """An argument the user can correct; the message is one line and names it."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
