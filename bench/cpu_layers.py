"""Times every distinct convolution layer of a torchvision ResNet on the CPU, three ways.

    python bench/cpu_layers.py --model resnet50 --batch 1 --dtype float32 --filter 3x3

A layer is convolution, batch norm, residual add where the block has one, and ReLU where the block
has one. The three ways are eager PyTorch (one kernel each), oneDNN's fused convolution as
Inductor calls it (`mkldnn::_convolution_pointwise`, batch norm folded into prepacked weights
beforehand), and `fused_resnet.functional.conv_bn_act`. Calls are interleaved, times are medians.
Bytes count each of input, weight, residual and output once, so GB/s is a lower bound on the
traffic; the tensors of a layer stay in the last-level cache between calls where they fit, which
is kinder than a whole model is.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

try:
    from fused_resnet import functional as ours
except ImportError as error:
    ours = None
    OURS_MISSING = str(error)

EPS = 1e-5
WAYS = ("eager", "oneDNN", "ours")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution layer's shapes; `H`, `W` are the input's, `P`, `Q` the output's."""

    C: int
    K: int
    R: int
    S: int
    H: int
    W: int
    P: int
    Q: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    residual: bool
    activation: str

    @property
    def label(self) -> str:
        """For instance `3x3 64>64 56x56 /2 g32 +res relu`; what `--filter` searches."""
        parts = [f"{self.R}x{self.S}", f"{self.C}>{self.K}", f"{self.H}x{self.W}"]
        parts += [f"/{self.stride[0]}"] if self.stride != (1, 1) else []
        parts += [f"d{self.dilation[0]}"] if self.dilation != (1, 1) else []
        parts += [f"g{self.groups}"] if self.groups != 1 else []
        parts += ["+res"] if self.residual else []
        parts += ["relu"] if self.activation == "relu" else []
        return " ".join(parts)

    def flop(self, batch: int) -> int:
        """Twice the multiply-adds of the convolution."""
        return 2 * batch * self.P * self.Q * self.K * self.R * self.S * self.C // self.groups

    def bytes(self, batch: int, itemsize: int) -> int:
        """Input, weight, residual and output, each counted once."""
        output = batch * self.K * self.P * self.Q
        input = batch * self.C * self.H * self.W
        weight = self.K * self.C * self.R * self.S // self.groups
        return itemsize * (input + weight + output * (2 if self.residual else 1))


def layers_of(model_name: str, image_size: int) -> dict[Layer, list[str]]:
    """The distinct convolution layers of a torchvision ResNet, each with its module paths."""
    model = torchvision.models.get_model(model_name).eval()
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    for name, module in convolutions.items():
        module.register_forward_hook(
            lambda m, args, out, name=name: shapes.update({name: (args[0].shape, out.shape)})
        )
    with torch.inference_mode():
        model(torch.zeros(1, 3, image_size, image_size))

    found: dict[Layer, list[str]] = {}
    for name, module in convolutions.items():
        (_, C, H, W), (_, K, P, Q) = shapes[name]
        parent = model.get_submodule(name.rpartition(".")[0])
        last = "conv3" if hasattr(parent, "conv3") else "conv2"
        projection = isinstance(parent, torch.nn.Sequential)
        layer = Layer(
            C=C, K=K, R=module.kernel_size[0], S=module.kernel_size[1], H=H, W=W, P=P, Q=Q,
            stride=module.stride, padding=module.padding, dilation=module.dilation,
            groups=module.groups, residual=name.endswith("." + last),
            activation="none" if projection else "relu",
        )  # fmt: skip
        found.setdefault(layer, []).append(name)
    return found


class Case:
    """Tensors of one layer and the three ways to run it."""

    def __init__(self, layer: Layer, batch: int, dtype: torch.dtype, seed: int = 0) -> None:
        self.layer = layer
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        fan_in = layer.C * layer.R * layer.S / layer.groups
        nhwc = {"dtype": dtype, "memory_format": torch.channels_last}
        self.input = normal(batch, layer.C, layer.H, layer.W).to(**nhwc)
        weight = normal(layer.K, layer.C // layer.groups, layer.R, layer.S) / fan_in**0.5
        self.weight = weight.to(**nhwc)
        self.mean = normal(layer.K) / 4
        self.var = normal(layer.K).exp()
        self.bn_weight = 1 + normal(layer.K) / 4
        self.bn_bias = normal(layer.K) / 4
        self.residual = None
        if layer.residual:
            self.residual = normal(batch, layer.K, layer.P, layer.Q).to(**nhwc)
        self._fold()

    def _fold(self) -> None:
        """Folds batch norm into the weight in float32, and prepacks as Inductor's freezing does."""
        layer = self.layer
        scale = self.bn_weight * torch.rsqrt(self.var + EPS)
        folded = (self.weight.float() * scale[:, None, None, None]).to(self.weight.dtype)
        self.folded_bias = (self.bn_bias - self.mean * scale).to(self.weight.dtype)
        self.folded_weight = torch.ops.mkldnn._reorder_convolution_weight(
            folded, layer.padding, layer.stride, layer.dilation, layer.groups, self.input.shape
        )  # fmt: skip

    def eager(self) -> torch.Tensor:
        """One kernel each, in place where torchvision's blocks are."""
        layer = self.layer
        out = F.conv2d(
            self.input, self.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups
        )
        out = F.batch_norm(out, self.mean, self.var, self.bn_weight, self.bn_bias, False, 0.1, EPS)
        if self.residual is not None:
            out += self.residual
        return F.relu_(out) if layer.activation == "relu" else out

    def onednn(self) -> torch.Tensor:
        """Inductor's fused convolution, with the add and the ReLU as post-ops."""
        layer = self.layer
        shape = (layer.padding, layer.stride, layer.dilation, layer.groups)
        if self.residual is None:
            return torch.ops.mkldnn._convolution_pointwise(
                self.input, self.folded_weight, self.folded_bias, *shape, layer.activation, [], ""
            )
        return torch.ops.mkldnn._convolution_pointwise.binary(
            self.input, self.residual, self.folded_weight, self.folded_bias, *shape,
            "add", 1.0, "relu", [], "",
        )  # fmt: skip

    def ours(self) -> torch.Tensor:
        """This package's operator on the raw parameters."""
        layer = self.layer
        return ours.conv_bn_act(
            self.input, self.weight, self.mean, self.var, self.bn_weight, self.bn_bias, EPS,
            stride=layer.stride, padding=layer.padding, dilation=layer.dilation,
            groups=layer.groups, residual=self.residual, activation=layer.activation,
        )  # fmt: skip

    def truth(self, images: int) -> torch.Tensor:
        """The first `images` images in float64."""
        layer = self.layer
        out = F.conv2d(
            self.input[:images].double(), self.weight.double(), None,
            layer.stride, layer.padding, layer.dilation, layer.groups,
        )  # fmt: skip
        bn = (self.mean, self.var, self.bn_weight, self.bn_bias)
        out = F.batch_norm(out, *(t.double() for t in bn), False, 0.1, EPS)
        if self.residual is not None:
            out = out + self.residual[:images].double()
        return out.relu() if layer.activation == "relu" else out


@dataclasses.dataclass(frozen=True)
class Measured:
    """Median time of a call and relative error against float64."""

    ms: float
    error: float


def measure(case: Case, rounds: int, seconds_per_turn: float) -> dict[str, Measured]:
    """Median time of each way, turns interleaved.

    A turn repeats short calls, so that neither the clock's own cost nor what the previous way left
    in the caches shows.
    """
    ways: dict[str, Callable[[], torch.Tensor]] = {"eager": case.eager, "oneDNN": case.onednn}
    if ours is not None:
        ways["ours"] = case.ours
    truth = case.truth(images=1)
    errors, calls, times = {}, {}, {way: [] for way in ways}
    for way, call in ways.items():
        output = call()[:1].double()
        errors[way] = ((output - truth).norm() / truth.norm()).item()
        start = time.perf_counter()
        call()
        calls[way] = max(1, round(seconds_per_turn / (time.perf_counter() - start)))
    for _ in range(rounds):
        for way, call in ways.items():
            call()
            start = time.perf_counter()
            for _ in range(calls[way]):
                call()
            times[way].append((time.perf_counter() - start) / calls[way])
    return {way: Measured(1e3 * statistics.median(times[way]), errors[way]) for way in ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--turn-ms", type=float, default=3.0, help="least time of one turn")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--filter", default="", help="only layers whose label has this substring")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    found = layers_of(arguments.model, arguments.image_size)
    found = {layer: names for layer, names in found.items() if arguments.filter in layer.label}

    console = Console()
    if not console.is_terminal:
        console = Console(width=170)
    what = (arguments.model, f"batch {arguments.batch}", arguments.dtype)
    table = Table(title=", ".join((*what, f"{arguments.threads} threads")), header_style="bold")
    table.add_column("layer")
    table.add_column("n", justify="right")
    for way in WAYS:
        for column in ("ms", "GFLOP/s", "GB/s", "error"):
            table.add_column(f"{way}\n{column}", justify="right")
    table.add_column("ours /\neager", justify="right")
    table.add_column("ours /\noneDNN", justify="right")

    totals = dict.fromkeys(WAYS, 0.0)
    with torch.inference_mode(), Progress(console=console, transient=True) as progress:
        for layer, names in progress.track(found.items(), description="layers"):
            case = Case(layer, arguments.batch, dtype)
            measured = measure(case, arguments.rounds, arguments.turn_ms / 1e3)
            cells = [layer.label, str(len(names))]
            for way in WAYS:
                if way not in measured:
                    cells += ["-"] * 4
                    continue
                ms = measured[way].ms
                totals[way] += ms * len(names)
                cells += [
                    f"{ms:.3f}",
                    f"{layer.flop(arguments.batch) / ms / 1e6:.0f}",
                    f"{layer.bytes(arguments.batch, dtype.itemsize) / ms / 1e6:.1f}",
                    f"{measured[way].error:.1e}",
                ]
            cells += [ratio(measured, "eager"), ratio(measured, "oneDNN")]
            table.add_row(*cells)
    table.add_section()
    cells = ["sum over the model's layers", str(sum(map(len, found.values())))]
    for way in WAYS:
        cells += [f"{totals[way]:.2f}" if totals[way] else "-", "", "", ""]
    for other in ("eager", "oneDNN"):
        cells.append(f"{totals['ours'] / totals[other]:.2f}" if totals["ours"] else "-")
    table.add_row(*cells)
    console.print(table)
    if ours is None:
        console.print(f"no 'ours' column: {OURS_MISSING}")


def ratio(measured: dict[str, Measured], other: str) -> str:
    return f"{measured['ours'].ms / measured[other].ms:.2f}" if "ours" in measured else "-"


if __name__ == "__main__":
    main()
