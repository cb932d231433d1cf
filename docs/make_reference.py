"""Writes reference.md, the public names with their signatures and docstrings.

python docs/make_reference.py
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import fused_resnet
from fused_resnet import backends, functional, models, testing

REFERENCE = Path(__file__).resolve().parent / "reference.md"

MODULES: list[tuple[ModuleType, list[str]]] = [
    (
        fused_resnet,
        [
            *("fuse", "unfuse", "report", "register_form"),
            *("BasicBlock", "Bottleneck", "ResNet", "use_backend"),
            *("quantize", "dequantize", "quantization_state", "save_quantization_state"),
            *("load_quantization_state", "prepare_qat", "decompositions", "unfused"),
            "carries_metadata",
        ],
    ),
    (
        functional,
        [
            *("conv_bn_act", "norm_conv_bn_act", "conv_bn_act_max_pool"),
            *("batch_norm_act", "sync_batch_norm_act"),
        ],
    ),
    (models, models.__all__),
    (backends, ["available", "explain", "register", "release"]),
    (backends.cpu, ["empty_cache"]),
    (testing, ["assert_error_rule", "randomize_", "relative_error"]),
]


def main() -> None:
    """Writes the file."""
    REFERENCE.write_text(text())


def text() -> str:
    """The whole file."""
    parts = [
        "# Reference\n",
        "Written by `docs/make_reference.py` from the docstrings. What each operator means is\n"
        "said best by `fused_resnet/reference.py`, in plain PyTorch.\n",
    ]
    for module, members in MODULES:
        parts.append(f"## {module.__name__}\n")
        parts += [_entry(name, getattr(module, name)) for name in members]
    return "\n".join(parts)


class _Bare(str):
    """An annotation as it stands in the source, without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _entry(name: str, member: Callable) -> str:
    signature = inspect.signature(member)
    bare = [p.replace(annotation=_bare(p.annotation)) for p in signature.parameters.values()]
    signature = signature.replace(
        parameters=bare, return_annotation=_bare(signature.return_annotation)
    )
    return f"### `{name}`\n\n```text\n{name}{signature}\n\n{inspect.getdoc(member)}\n```\n"


def _bare(annotation: object) -> object:
    return _Bare(annotation) if isinstance(annotation, str) else annotation


if __name__ == "__main__":
    main()
