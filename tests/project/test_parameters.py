"""No function of the host takes more than eight parameters, but for those that have a reason to.

What users type stays flat, and so does what the dispatcher calls: its schemas have no tuples of
tensors. What else takes more is listed, and the list may only become shorter.
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
# Functions with the parameters of an operator's schema.
SCHEMAS = {
    "ops/conv_bn_act.py": {"conv_bn_act", "_fake"},
    "ops/conv_bn_act_max_pool.py": {"conv_bn_act_max_pool", "_fake"},
    "ops/norm_conv_bn_act.py": {"norm_conv_bn_act", "_fake"},
    "ops/operator_checks.py": {"block_training_backward"},
    "backends/triton/graphs.py": {"triton_conv_bn_act", "triton_conv_bn_act_max_pool"},
}
# Below the class `Backend`, and between it and the operators.
REMAINING = {
    "backends/cpu.py": {
        "batch_norm_act_backward",
        "batch_norm_act_backward_input",
        "batch_norm_act_backward_sums",
        "conv_bn_act",
        "conv_bn_act_max_pool",
        "norm_conv_bn_act",
    },
    "backends/cuda.py": {
        "batch_norm_act_backward",
        "batch_norm_act_backward_input",
        "batch_norm_act_backward_sums",
        "conv_bn_act",
        "conv_bn_act_max_pool",
    },
    "backends/cudnn.py": {
        "conv_bn_act",
    },
    "backends/library.py": {
        "_output",
        "batch_norm_act_backward",
        "batch_norm_act_backward_input",
        "batch_norm_act_backward_sums",
        "batch_norm_act_inference",
        "conv_bn_act",
        "conv_bn_act_max_pool",
    },
    "backends/triton/conv.py": {
        "conv_bn_act",
        "sum_partials",
    },
    "backends/triton/inference.py": {
        "conv_bn_act",
        "conv_bn_act_max_pool",
        "norm_conv_bn_act",
    },
    "backends/triton/norm.py": {
        "_input_pass",
        "batch_norm_act_backward",
        "batch_norm_act_backward_input",
        "batch_norm_act_backward_sums",
        "batch_norm_act_inference",
    },
    "backends/triton/stem.py": {
        "conv_bn_act_max_pool",
    },
    "backends/triton/training.py": {
        "_backward_tile",
        "batch_norm_act_backward",
        "batch_norm_act_backward_input",
        "batch_norm_act_backward_sums",
        "conv_backward_input",
        "conv_backward_input_runs",
        "norm_conv_backward_input",
    },
    "backends/triton/training_conv.py": {
        "_launch",
        "backward_input",
    },
    "layers/checks.py": {
        "batch_norm_error",
        "conv_error",
        "pool_error",
    },
    "ops/conv_bn_act_max_pool.py": {
        "run_conv_bn_act_max_pool",
    },
    "ops/gradients.py": {
        "conv_norm_backward",
        "norm_act_backward",
    },
    "ops/running_statistics.py": {
        "run_batch_norm_act",
        "run_sync_batch_norm_act",
    },
    "ops/sync_batch_norm_act.py": {
        "shared_backward",
    },
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
        allowed = SCHEMAS.get(name, set()) | REMAINING.get(name, set())
        assert many_parameters(path.read_text()) == allowed, name
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
