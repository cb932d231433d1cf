"""The files that need Triton, imported when a kernel first runs."""

from __future__ import annotations

import functools
from types import ModuleType

from .eligible import interpreted


@functools.cache
def graph_operators() -> ModuleType:
    """`graphs.py`: what a compiler's graph holds."""
    from . import graphs

    return graphs


@functools.cache
def launchers() -> ModuleType:
    """`conv.py`, imported when it is first needed, since it needs Triton."""
    if interpreted():
        from .interpreter import repair

        repair()
    from . import conv

    return conv


@functools.cache
def norms() -> ModuleType:
    """`norm.py`, imported likewise."""
    launchers()
    from . import norm

    return norm


@functools.cache
def training_convolutions() -> ModuleType:
    """`training_conv.py`, imported likewise."""
    launchers()
    from . import training_conv

    return training_conv


@functools.cache
def stems() -> ModuleType:
    """`stem.py`, imported likewise."""
    launchers()
    from . import stem

    return stem


@functools.cache
def layouts() -> ModuleType:
    """`layout.py`, imported likewise."""
    launchers()
    from . import layout

    return layout
