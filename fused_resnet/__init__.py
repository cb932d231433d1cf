"""Fused drop-in blocks for torchvision's ResNets: fewer passes over memory, the same numbers."""

from . import (
    _native,  # noqa: F401  registers the compiled operators, or says how to build them
    backends,
    functional,
    models,
    reference,
)
from .backends import use_backend
from .blocks import BasicBlock, Bottleneck, ResNet
from .modules.metadata import carries_metadata
from .modules.read import unfused
from .ops.decompositions import decompositions
from .quantization import (
    dequantize,
    load_quantization_state,
    prepare_qat,
    quantization_state,
    quantize,
    save_quantization_state,
)
from .swap import fuse, report, unfuse

__version__ = "0.1.0"

__all__ = [
    "BasicBlock",
    "Bottleneck",
    "ResNet",
    "__version__",
    "backends",
    "carries_metadata",
    "decompositions",
    "dequantize",
    "functional",
    "fuse",
    "load_quantization_state",
    "models",
    "prepare_qat",
    "quantization_state",
    "quantize",
    "reference",
    "report",
    "save_quantization_state",
    "unfuse",
    "unfused",
    "use_backend",
]
