"""No function of the host takes more than eight parameters, but for those that have a reason to.

What users type stays flat, and so does what the dispatcher calls: its schemas have no tuples of
tensors. Everything between takes the descriptions of `fused_resnet/layers/description.py`.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fused_resnet

PACKAGE = Path(fused_resnet.__file__).parent
MOST = 8

# Users' keywords, and the specification, which has the same.
USERS = ("functional.py", "reference.py", "cli/", "models/")
# Functions with users' keywords, or the parameters of an operator's schema.
FLAT = {
    "backends/registry.py": {"explain"},
    "quantization/quantize.py": {"quantize"},
    "ops/conv_bn_act.py": {"_fake"},
    "ops/conv_bn_act_max_pool.py": {"_fake"},
    "ops/conv_bn_act_max_pool_int8.py": {"_fake"},
    "ops/norm_conv_bn_act.py": {"_fake"},
    "ops/quantized.py": {"_fake", "_kernel"},
    "ops/operator_checks.py": {"block_training_backward", "quantized_residual_blocks"},
    "backends/triton/graphs.py": {"triton_conv_bn_act", "triton_conv_bn_act_max_pool"},
}

pytestmark = pytest.mark.quick


def many_parameters(source: str) -> set[str]:
    """Functions with more than `MOST` parameters, without kernels, which run on a device."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        every = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        if len([one for one in every if one.arg not in ("self", "cls", "ctx")]) > MOST:
            found.add(node.name)
    return found


def test_parameters() -> None:
    seen = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        seen += 1
        if name.startswith(USERS):
            continue
        assert many_parameters(path.read_text()) == FLAT.get(name, set()), name
    assert seen > 90


def test_what_is_counted() -> None:
    nine = ", ".join(f"a{i}" for i in range(9))
    source = f"""
class Class:
    def method(self, {nine}): pass
    def fits(self, {nine[4:]}): pass
def keywords(a, *, {nine[4:]}): pass
@triton.jit
def kernel({nine}): pass
"""
    assert many_parameters(source) == {"method", "keywords"}
