"""What the launches of a pass share: norms folded by one launch, sums added up by the last program.

Interpreted where there is no GPU. Launches are counted in test_on_stub.py, instructions in
test_triton_static.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from conftest import RUNNERS
from support import assert_same_bits, small_resnet
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

import fused_resnet
from fused_resnet import backends
from fused_resnet.layers.description import ConvNorm, Norm
from fused_resnet.tuning.choice import Tile

RUNNER = next((runner for runner in RUNNERS if runner.name == "triton"), None)

pytestmark = pytest.mark.skipif(RUNNER is None, reason=backends.available()["triton"])

if RUNNER is not None:
    backends.triton.launchers()
    from fused_resnet.backends.triton import bottleneck, conv, folded
    from fused_resnet.backends.triton import launch as launches


def layer_of(K: int, C: int, size: int, dtype: torch.dtype, leave_out: str = "") -> ConvNorm:
    """A random layer whose norm's vectors have a dtype; of some there are none."""
    generator = torch.Generator().manual_seed(K + C + size)

    def vector(scale: float = 1.0) -> Tensor:
        values = torch.randn(K, generator=generator) * scale
        return values.to(RUNNER.device, dtype)

    weight = torch.randn(K, C, size, size, generator=generator) / (C * size * size) ** 0.5
    norm = Norm(
        vector(),
        vector().abs() + 0.5,
        None if "weight" in leave_out else nn.Parameter(vector()),
        None if "shift" in leave_out else vector(),
        10.0 ** -(1 + K % 5),
    )
    bias = None if "bias" in leave_out else vector()
    weight = weight.half().to(RUNNER.device, memory_format=torch.channels_last)
    padding = (size // 2, size // 2)
    return ConvNorm(weight, norm, bias, (1, 1), padding, (1, 1), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_table_is_what_programs_fold(dtype):
    """Of more channels than a program has, of few, with and without each vector; tickets are 0."""
    layers = [
        layer_of(K, 16, 1, dtype, leave_out)
        for K, leave_out in ((300, ""), (5, "bias"), (64, "shift"), (16, "shift, bias"), (512, ""))
    ]
    layers.append(layer_of(24, 16, 1, dtype, "weight, bias"))
    x = torch.empty(1, 16, 4, 4, dtype=torch.float16, device=RUNNER.device)
    with launches.logged() as log, folded.shared(x, layers):
        assert [one.kernel for one in log] == ["fold_norms_kernel"]
        shared = folded.current.get()
        assert not shared.tickets.any()
        for layer in layers:
            (scale, var, weight, shift, bias), eps = folded.parameters_of(layer.norm, layer.bias)
            assert (var, weight, bias, eps) == (None, None, None, 0.0)
            mean, var, weight, bn_bias, eps = (
                t.double() if isinstance(t, Tensor) else t for t in layer.norm
            )
            exact = (var + eps).rsqrt() * (1 if weight is None else weight)
            moved = ((0 if layer.bias is None else layer.bias.double()) - mean) * exact
            moved = moved + (0 if bn_bias is None else bn_bias)
            torch.testing.assert_close(scale.double(), exact, rtol=1e-6, atol=0)
            torch.testing.assert_close(shift.double(), moved, rtol=1e-5, atol=1e-5)
        other = layer_of(8, 8, 1, dtype)
        assert folded.parameters_of(other.norm, None)[0][0] is other.norm.mean
    assert folded.current.get() is None
    assert folded.take_tickets(1) is None


def test_the_table_is_made_anew_in_every_pass():
    layers = [layer_of(16, 16, 1, torch.float32), layer_of(32, 16, 1, torch.float32)]
    x = torch.empty(1, 16, 4, 4, dtype=torch.float16, device=RUNNER.device)

    def scale() -> Tensor:
        with folded.shared(x, layers):
            return folded.parameters_of(layers[1].norm, layers[1].bias)[0][0].clone()

    before = scale()
    kept = folded._kept[id(layers[0].norm.mean)]
    (rows,) = kept.rows.values()
    with torch.no_grad():
        layers[1].norm.weight.mul_(2)
    assert_same_bits(scale(), before * 2)
    assert [*kept.rows.values()] == [rows]
    layers[1].norm.weight.data = layers[1].norm.weight.data * 2
    assert_same_bits(scale(), before * 4)
    assert rows not in kept.rows.values()


def test_norms_that_are_folded_in_each_tile():
    """Of several dtypes, and of tensors that are no parameters."""
    x = torch.empty(1, 16, 4, 4, dtype=torch.float16, device=RUNNER.device)
    mixed = [layer_of(16, 16, 1, torch.float32), layer_of(32, 16, 1, torch.float16)]
    passing = [layer_of(16, 16, 1, torch.float32, "weight"), layer_of(32, 16, 1, torch.float32)]
    for layers in (mixed, passing):
        with launches.logged() as log, folded.shared(x, layers):
            norm, bias = layers[0].norm, layers[0].bias
            assert folded.parameters_of(norm, bias)[0][0] is norm.mean
        assert not log


@contextlib.contextmanager
def programs_backwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter's programs in the opposite order: another one is the last to come."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    forwards = type(builder).set_grid_idx

    def backwards(self, x: int, y: int, z: int) -> None:
        sizes = self.grid_dim
        forwards(self, sizes[0] - 1 - x, sizes[1] - 1 - y, sizes[2] - 1 - z)

    with monkeypatch.context() as patched:
        patched.setattr(type(builder), "set_grid_idx", backwards)
        yield


def split_conv(layer: ConvNorm, x: Tensor, residual: Tensor | None) -> Tensor:
    return conv.conv_bn_act(x, layer, residual, "relu", Tile(16, 16, 16, 5, 4, 2))


def split_pair(layer: ConvNorm, x: Tensor, residual: Tensor | None) -> Tensor:
    expand = ConvNorm(*layer_of(64, x.size(1), 1, torch.float32))
    reduce = ConvNorm(*layer_of(32, 64, 1, torch.float32))
    shortcut = x.repeat(1, 64 // x.size(1), 1, 1).contiguous(memory_format=torch.channels_last)
    tile = Tile(16, 16, 16, 4, 4, 2)
    with folded.shared(x, [expand, reduce]) if folded.is_shared() else contextlib.nullcontext():
        return bottleneck.bottleneck(x, shortcut, None, expand, None, reduce, tile)[1]


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="programs of a GPU come in no order that can be chosen"
)
@pytest.mark.parametrize("run", [split_conv, split_pair])
@pytest.mark.single
def test_the_last_program_adds_up_in_order(run, monkeypatch):
    """The bits of a launch that adds up, whoever is last; NaN and infinities too."""
    layer = layer_of(40, 32, 3, torch.float32)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 32, 5, 4, generator=generator).half()
    x[0, 3, 2, 1], x[1, 0, 0, 0] = torch.inf, torch.nan
    x = x.to(memory_format=torch.channels_last)
    residual = torch.randn(2, 40, 5, 4, generator=generator).half()
    with launches.logged() as log:
        expected = run(layer, x, residual)
    kernel = log[-2].kernel
    assert [one.kernel for one in log[-2:]] == [kernel, "sum_partials_kernel"]
    assert expected.isnan().any()
    for backwards in (False, True):
        order = programs_backwards(monkeypatch) if backwards else contextlib.nullcontext()
        with order, launches.logged() as log, folded.shared(x, [layer]):
            out = run(layer, x, residual)
        assert [one.kernel for one in log][-1] == kernel
        assert "sum_partials_kernel" not in [one.kernel for one in log]
        assert_same_bits(out, expected)


def test_tickets_are_nobody_else_s():
    """Each launch has its own; where there are none left, a launch adds up."""
    layer = layer_of(40, 32, 3, torch.float32)
    x = torch.randn(2, 32, 5, 4).half().to(RUNNER.device, memory_format=torch.channels_last)
    with folded.shared(x, [layer]), launches.logged() as log:
        first = split_conv(layer, x, None)
        taken = folded.current.get().taken
        assert_same_bits(split_conv(layer, x, None), first)
        assert folded.current.get().taken == 2 * taken
        assert (folded.current.get().tickets[: 2 * taken] > 0).sum() == 2 * 9
        folded.current.get().taken = folded.TICKETS
        assert_same_bits(split_conv(layer, x, None), first)
    assert [one.kernel for one in log] == ["conv_kernel"] * 3 + ["sum_partials_kernel"]


def test_networks_of_basic_blocks_share():
    model = small_resnet(BasicBlock, stages=2).half().to(RUNNER.device)
    model = fused_resnet.fuse(model.to(memory_format=torch.channels_last))
    x = torch.randn(1, 3, 16, 16).half().to(RUNNER.device, memory_format=torch.channels_last)
    with torch.no_grad(), fused_resnet.use_backend("triton"), launches.logged() as log:
        model(x)
    assert [one.kernel for one in log].count("fold_norms_kernel") == 1
