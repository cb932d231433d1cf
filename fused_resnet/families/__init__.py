"""Fused forms of other libraries' modules, one file a library; see `forms.py`."""

from __future__ import annotations

import importlib
import sys

_FILES = {
    "fused_resnet.models": "models",
    "timm.models.resnet": "timm",
    "torchvision.models.densenet": "densenet",
}
"""These files, by the module without which a model has nothing for one to fuse."""


def load() -> None:
    """Registers the classes of every family whose library has been imported."""
    for library, file in _FILES.items():
        if library in sys.modules:
            importlib.import_module(f"{__name__}.{file}")
