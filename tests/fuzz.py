"""Draws calls of the public functions and of the registered operators, and checks what comes back.

    python tests/fuzz.py --calls 100000 --seed 1 [--sanitize]

Every call follows from the seed and its index alone. It is one of

- a public function, on odd layouts (strided, expanded, channels_last, unaligned), with NaN and
  infinity, forward and backward, compared with float64 by a path without the library's convolution;
- a few passes of a fused network (support/fuzzed_networks.py): joined blocks, plans, training;
- residual blocks or a stem in integers, by any of the CPU's kernels, compared bit by bit with the
  reference;
- a registered operator with arguments of which some are hostile: dtypes, ranks, sizes, strides and
  numbers that do not belong there. It may return what it likes or raise, but not the exceptions of
  a program that did not expect its arguments.

Calls are made by child processes, forks of one that has imported torch, which say what call they
are about to make. A child that dies, or is silent for too long, is a finding with a command that
repeats it. Every finding is tried again with float64 matrix products in the place of the library's
convolution: what is right then is the library's, the finding says so, and it does not fail the run.

With `--sanitize` the native library is built with AddressSanitizer and UndefinedBehaviorSanitizer
into build/sanitized first (`FUSED_RESNET_SANITIZE`, see build_support/native.py). The instruction
sets take turns (`FUSED_RESNET_CPU_ISA`).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import unittest.mock
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SANITIZED = ROOT / "build" / "sanitized"
ISAS = ("amx", "amx_emulated", "avx512bf16", "avx512bf16_emulated", "avx512", "avx2", "none")
CALLS_PER_CHILD = 500

# ---- the parent ----------------------------------------------------------------------------------


def build_sanitized() -> dict[str, str]:
    """Builds the package with sanitizers; what a process needs in its environment to import it."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(SANITIZED)],
        cwd=ROOT,
        env={**os.environ, "FUSED_RESNET_SANITIZE": "address,undefined", "FUSED_RESNET_CUDA": "0"},
        check=True,
    )
    (package,) = SANITIZED.glob("lib*/fused_resnet")
    compiler = os.environ.get("CXX", "c++")
    preload = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return {
        "PYTHONPATH": str(package.parent),
        "LD_PRELOAD": " ".join(preload),
        # Python and torch keep memory for good, and allocations that fail are part of the game.
        # New memory is full of NaN, for whoever reads what was not written.
        "ASAN_OPTIONS": "abort_on_error=1:detect_leaks=0:allocator_may_return_null=1:"
        "max_allocation_size_mb=2048:alloc_dealloc_mismatch=0:detect_odr_violation=0:"
        # What only a search for leaks needs, and short stacks of allocations, for speed.
        "intercept_tls_get_addr=0:malloc_context_size=6:"
        "quarantine_size_mb=32:max_malloc_fill_size=1048576:malloc_fill_byte=255",
        "UBSAN_OPTIONS": "abort_on_error=1:print_stacktrace=1",
    }


def run_all(options: argparse.Namespace) -> int:
    """All calls, each instruction set's in a process of its own; the exit status."""
    environment = dict(os.environ)
    if options.sanitize:
        environment.update(build_sanitized())
    elif importlib.util.find_spec("fused_resnet") is None:  # built in place, then
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    environment["OMP_WAIT_POLICY"] = "passive"
    findings: list[dict[str, Any]] = []
    outcomes: Counter[str] = Counter()
    chosen = ISAS if options.isa == "all" else (options.isa,)
    for turn, isa in enumerate(chosen):
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:]]
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder, "result")
            subprocess.run(
                [*command, "--result", str(result), "--turn", str(turn), str(len(chosen))],
                env={**environment, "FUSED_RESNET_CPU_ISA": isa},
                cwd=folder,
                check=True,
            )
            its = json.loads(result.read_text())
        findings += its["findings"]
        outcomes.update({f"{isa} {outcome}": n for outcome, n in its["outcomes"].items()})
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:8d}  {outcome}")
    ours = [finding for finding in findings if not finding.get("library")]
    print(
        f"{options.calls} calls, {len(ours)} findings, {len(findings) - len(ours)} of the "
        "library's convolution"
    )
    return 1 if ours else 0


class Run:
    """The calls that are one instruction set's, in forks of this process, one after the other."""

    def __init__(self, options: argparse.Namespace) -> None:
        import resource

        import fused_resnet  # noqa: F401  (registers the operators)

        if "asan" not in os.environ.get("LD_PRELOAD", ""):
            # Absurd sizes are to fail, not to fill the machine.
            resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self.options = options
        self.isa = os.environ["FUSED_RESNET_CPU_ISA"]
        self.findings: list[dict[str, Any]] = []
        self.outcomes: Counter[str] = Counter()

    def all(self) -> None:
        turn, turns = self.options.turn
        first, last = self.options.first, self.options.first + self.options.calls
        since, done = time.monotonic(), 0
        for chunk in range(first // CALLS_PER_CHILD, (last - 1) // CALLS_PER_CHILD + 1):
            if chunk % turns != turn:
                continue
            start = max(first, chunk * CALLS_PER_CHILD)
            end = min(last, (chunk + 1) * CALLS_PER_CHILD)
            self.some(start, end)
            done += end - start
            print(
                f"{self.isa}: {done} calls in {time.monotonic() - since:.0f} s, "
                f"{len(self.findings)} findings",
                file=sys.stderr,
                flush=True,
            )

    def some(self, first: int, end: int) -> None:
        """Calls [first, end), in new children for as long as calls kill them."""
        while first < end:
            last, why, said = self.child(first, end, library=True)
            if why is None:
                return
            by_library = self.child(last, last + 1, library=False)[1] is None
            self.add({"call": last, "what": why, "library": by_library, "detail": said})
            first = last + 1

    def child(self, first: int, end: int, library: bool) -> tuple[int, str | None, str]:
        """The last call begun, and why the child ended early, if it did, with its last words.

        Without the library, another convolution is in its place, and only survival counts.
        """
        with tempfile.TemporaryFile() as output:
            reading, writing = os.pipe()
            process = os.fork()
            if process == 0:
                os.close(reading)
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                run_child(self.options, first, end, writing, library)
            os.close(writing)
            last, hangs = first, False
            unread = b""
            while True:
                if not select.select([reading], [], [], self.options.timeout)[0]:
                    hangs = True
                    os.kill(process, signal.SIGKILL)
                    break
                data = os.read(reading, 1 << 16)
                if not data:
                    break
                *lines, unread = (unread + data).split(b"\n")
                for line in lines:
                    entry = json.loads(line)
                    last = entry.get("call", last)
                    if "broken" in entry:
                        raise RuntimeError(f"the fuzzer itself failed:\n{entry['broken']}")
                    if "what" in entry:
                        self.add(entry)
                    self.outcomes.update(entry.get("outcomes", {}))
            os.close(reading)
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            output.seek(0)
            said = "\n".join(output.read().decode(errors="replace").splitlines()[:80])
        if hangs:
            return last, "hangs", said
        if code == 0:
            return last, None, said
        return last, signal.Signals(-code).name if code < 0 else f"exit code {code}", said

    def add(self, finding: dict[str, Any]) -> None:
        self.findings.append(finding)
        options = self.options
        repeat = (
            f"python tests/fuzz.py --seed {options.seed} --first {finding['call']} --calls 1 "
            f"--isa {self.isa} --kinds {options.kinds} --threads {options.threads}"
        )
        if options.sanitize:
            repeat += " --sanitize"
        by = " (not with another convolution than the library's)" if finding.get("library") else ""
        print(f"FINDING {finding['what']}{by}\n  {repeat}", flush=True)
        print("  " + str(finding.get("detail", "")).replace("\n", "\n  "), flush=True)


# ---- the child -----------------------------------------------------------------------------------


def run_child(
    options: argparse.Namespace, first: int, end: int, journal: int, library: bool
) -> None:
    """Makes the calls [first, end), each after it has been written down, and ends the process."""
    import torch

    def write(**entry: Any) -> None:
        os.write(journal, (json.dumps(entry) + "\n").encode())

    try:
        torch.set_num_threads(options.threads)
        for index in range(first, end):
            write(call=index)
            if not library:
                with another_convolution():
                    run_call(options, index)
                continue
            call, outcome, wrong = run_call(options, index)
            write(outcomes={f"{type(call).__name__} {outcome}": 1})
            if wrong is not None:
                with another_convolution():
                    by_library = run_call(options, index)[2] is None
                write(call=index, what=outcome, library=by_library, detail=f"{call}\n{wrong}")
    except BaseException:
        write(broken=traceback.format_exc())
    # Without the interpreter's own end, which has nothing to do with a call.
    os._exit(0)


def run_call(options: argparse.Namespace, index: int) -> tuple[Any, str, str | None]:
    """The call with this index, what came of it, and what is wrong with that, if anything is."""
    call = draw(options.seed, index, options.kinds)
    try:
        return call, *call.run()
    except Exception:
        return call, "raises", traceback.format_exc(limit=-4)


def draw(seed: int, index: int, kinds: str) -> Any:
    """The call with this index."""
    import torch

    rng = random.Random(f"{seed}/{index}")
    torch.manual_seed(rng.getrandbits(60))
    drawn = ("public", "raw", "quantized", "networks")
    kind = rng.choices(drawn, (8, 8, 4, 2))[0] if kinds == "all" else kinds
    if kind == "networks":
        from support.fuzzed_networks import draw_network

        return draw_network(rng)
    return {"public": draw_public, "quantized": draw_quantized, "raw": draw_raw}[kind](rng)


# Layouts of a tensor's values, of which `expanded` changes them.
LAYOUTS = ("contiguous", "channels_last", "strided", "unaligned", "transposed", "expanded")


def laid_out(tensor: Any, layout: str, rng: random.Random) -> Any:
    """`tensor` lying as `layout` says."""
    import torch

    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        dim = rng.randrange(tensor.dim())
        shape = list(tensor.shape)
        shape[dim] = shape[dim] * 2 + 1
        base = torch.full(shape, math.nan).to(tensor.dtype)
        part = base.narrow(dim, 1, shape[dim] - 1)[(slice(None),) * dim + (slice(None, None, 2),)]
        return part.copy_(tensor)
    if layout == "unaligned":
        base = torch.full((tensor.numel() + 1,), math.nan).to(tensor.dtype)
        return base[1:].view(tensor.shape).copy_(tensor)
    if layout == "transposed" and tensor.dim() > 1:
        order = list(range(tensor.dim()))
        rng.shuffle(order)
        back = [order.index(d) for d in range(tensor.dim())]
        return tensor.permute(order).contiguous().permute(back)
    if layout == "expanded":
        dim = rng.randrange(tensor.dim())
        return tensor.narrow(dim, 0, min(1, tensor.size(dim))).expand(tensor.shape)
    return tensor


def unit_roundoff(dtype: Any) -> float:
    import torch

    return torch.finfo(dtype).eps / 2


def conv_float64(
    x: Any,
    weight: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    zeros: bool = False,
) -> Any:
    """A convolution in float64 by products.

    Padding takes no part, or is `zeros`, of which a weight that is not finite makes NaN.
    """
    import torch
    import torch.nn.functional as F

    N, C, H, W = x.shape
    K, _, R, S = weight.shape
    P = (H + 2 * padding[0] - dilation[0] * (R - 1) - 1) // stride[0] + 1
    Q = (W + 2 * padding[1] - dilation[1] * (S - 1) - 1) // stride[1] + 1
    around = (padding[1], padding[1], padding[0], padding[0])
    padded = F.pad(x, around)

    def of_tap(image: Any, r: int, s: int) -> Any:
        """What a tap sees of `image`, for each output."""
        r, s = r * dilation[0], s * dilation[1]
        rows = slice(r, r + (P - 1) * stride[0] + 1, stride[0])
        return image[..., rows, s : s + (Q - 1) * stride[1] + 1 : stride[1]]

    taps = [(r, s) for r in range(R) for s in range(S)]
    filters = weight.reshape(groups, K // groups, C // groups, R * S)
    # Products and a sum, not a matrix product, for NaN and infinity of some pixels alone.
    columns = torch.stack([of_tap(padded, *tap) for tap in taps], 2)
    columns = columns.reshape(N, groups, C // groups, R * S, P * Q)
    if zeros or torch.isfinite(weight).all():
        return torch.einsum("ngctp,gkct->ngkp", columns, filters).reshape(N, K, P, Q)
    inside = F.pad(torch.ones(H, W, dtype=torch.bool), around)
    out = torch.zeros(N, groups, K // groups, P * Q, dtype=x.dtype)
    for i, tap in enumerate(taps):
        products = torch.einsum("ngcp,gkc->ngkp", columns[..., i, :], filters[..., i])
        out = torch.where(of_tap(inside, *tap).reshape(-1), out + products, out)
    return out.reshape(N, K, P, Q)


@contextlib.contextmanager
def another_convolution() -> Iterator[None]:
    """Puts `conv_float64`, rounded once, in the place of torch's convolution and its gradients."""
    import torch

    def forward(x, weight, bias, stride, padding, dilation, groups):
        if x.device.type != "cpu":  # fake kernels ask for shapes only
            return library(x, weight, bias, stride, padding, dilation, groups)
        out = conv_float64(x.double(), weight.double(), stride, padding, dilation, groups)
        if bias is not None:
            out = out + bias.double().view(1, -1, 1, 1)
        return out.to(x.dtype)

    def backward(grad, x, weight, _, stride, padding, dilation, transposed, more, groups, need):
        leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
        with torch.enable_grad():
            out = conv_float64(*leaves, stride, padding, dilation, groups)
        gradients = torch.autograd.grad(out, leaves, grad.double())
        gradients = [g.to(grad.dtype) for g in (*gradients, grad.double().sum((0, 2, 3)))]
        return tuple(g if wanted else None for g, wanted in zip(gradients, need, strict=True))

    library = torch.conv2d
    with (
        unittest.mock.patch.object(torch, "conv2d", forward),
        unittest.mock.patch.object(torch.ops.aten, "convolution_backward", backward),
    ):
        yield


def norm_float64(x: Any, mean: Any, var: Any, weight: Any, bias: Any, eps: float) -> Any:
    shape = (1, -1) + (1,) * (x.dim() - 2)
    scale = 1 / (var + eps).sqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return x * scale.view(shape) + shift.view(shape)


IN_NORM = ("in_mean", "in_var", "in_weight", "in_bias")


class Public:
    """One call of a function in `functional`, with valid arguments."""

    def __init__(self, name: str, tensors: dict[str, Any], numbers: dict[str, Any], grad: bool):
        self.name, self.tensors, self.numbers, self.grad = name, tensors, numbers, grad

    def __str__(self) -> str:
        described = {
            name: None if t is None else (str(t.dtype)[6:], tuple(t.shape), t.stride())
            for name, t in self.tensors.items()
        }
        return f"{self.name} {described} {self.numbers} grad={self.grad}"

    def arguments(self, grad: bool, double: bool = False) -> dict[str, Any]:
        def one(name: str, tensor: Any) -> Any:
            if tensor is None:
                return None
            tensor = tensor.detach()
            if double:
                tensor = tensor.double()
            statistic = name in ("running_mean", "running_var", "in_mean", "in_var")
            return tensor.requires_grad_() if grad and not statistic else tensor

        return {name: one(name, tensor) for name, tensor in self.tensors.items()}

    def call(self, arguments: dict[str, Any]) -> Any:
        from fused_resnet import functional

        return getattr(functional, self.name)(**arguments, **self.numbers)

    def expected(self, arguments: dict[str, Any], magnitude: bool, zeros: bool = False) -> Any:
        """Before the activation, in float64; or a bound of the sum of all terms' magnitudes.

        With `zeros` for padding, see `conv_float64`.
        """
        t = {
            name: value if value is None or not magnitude else value.abs()
            for name, value in arguments.items()
        }
        n = self.numbers
        x = t["input"]
        if self.name == "batch_norm_act":
            mean, var = t["running_mean"], t["running_var"]
            if n["training"]:
                dims = [0, *range(2, x.dim())]
                mean = arguments["input"].mean(dims)
                var = arguments["input"].var(dims, unbiased=False)
                mean = mean.abs() if magnitude else mean
            if magnitude:
                mean = -mean
            out = norm_float64(x, mean, var, t["weight"], t["bias"], n["eps"])
        else:
            if self.name == "norm_conv_bn_act":
                mean, *norm = (t[name] for name in IN_NORM)
                norm = (-mean if magnitude else mean, *norm)
                x = norm_float64(x, *norm, n["in_eps"]).relu()
                if not magnitude:
                    # As the function rounds it.
                    dtype = self.tensors["input"].dtype
                    x = x + (x.detach().to(dtype).double() - x.detach()).nan_to_num(0, 0, 0)
            out = conv_float64(x, t["weight"], *self.geometry(), zeros)
            if t["bias"] is not None:
                out = out + t["bias"].view(1, -1, 1, 1)
            mean = -t["running_mean"] if magnitude else t["running_mean"]
            norm = (mean, t["running_var"], t["bn_weight"], t["bn_bias"], n["eps"])
            out = norm_float64(out, *norm)
        if t.get("residual") is not None:
            out = out + t["residual"]
        return out

    def undecided(self) -> Any:
        """Where in the input rounding decides which way the ReLU inside `norm_conv_bn_act` goes."""
        import torch

        if self.name != "norm_conv_bn_act":
            return torch.zeros(self.tensors["input"].shape, dtype=torch.bool)
        t = self.arguments(False, double=True)
        x, mean, var, weight, bias = (t[n] for n in ("input", *IN_NORM))
        eps = self.numbers["in_eps"]
        value = norm_float64(x, mean, var, weight, bias, eps)
        weight, bias = (v if v is None else v.abs() for v in (weight, bias))
        size = norm_float64(x.abs(), -mean.abs(), var, weight, bias, eps)
        is_double = self.tensors["input"].dtype is torch.float64
        return value.abs() <= 8 * size * unit_roundoff(
            torch.float64 if is_double else torch.float32
        )

    def as_zeros(self, got: Any, want: Any) -> Any:
        """Where the library multiplies padding in our name, with a weight that is not finite.

        It does so in some dtypes, by which NaN is eager's number, too.
        """
        import torch
        import torch.nn.functional as F

        import fused_resnet
        from fused_resnet.backends import cpu

        nowhere, weight = torch.zeros((), dtype=torch.bool), self.tensors.get("weight")
        if self.name == "batch_norm_act" or torch.isfinite(weight).all():
            return nowhere
        if cpu.has_kernel(weight.dtype, weight.shape, self.numbers["groups"]):
            return nowhere
        zeros = self.expected(self.arguments(False, double=True), False, zeros=True)
        with fused_resnet.use_backend("reference"):
            eager = self.call(self.arguments(False))
        pool = [self.numbers.get(f"pool_{n}") for n in ("kernel_size", "stride", "padding")]
        zeros = zeros if pool[0] is None else F.max_pool2d(zeros, *pool)
        return torch.isnan(got) & torch.isnan(zeros) & torch.isnan(eager) & ~torch.isnan(want)

    def geometry(self) -> tuple[Any, ...]:
        n = self.numbers
        return pair(n["stride"]), pair(n["padding"]), pair(n["dilation"]), n["groups"]

    def terms(self) -> int:
        """How many products a sum has."""
        if self.name == "batch_norm_act":
            return 2
        _, C, R, S = self.tensors["weight"].shape
        return C * R * S

    def run(self) -> tuple[str, str | None]:
        import torch
        import torch.nn.functional as F

        tensors = [t for t in self.tensors.values() if t is not None]
        before = [t.clone() for t in tensors]
        # Running statistics are changed in training, and are to be, so it has copies.
        arguments = self.arguments(self.grad)
        if self.numbers.get("training"):
            for name in ("running_mean", "running_var"):
                if arguments[name] is not None:
                    arguments[name] = arguments[name].clone()
        output = self.call(arguments)
        exact = self.arguments(self.grad, double=True)
        pre = self.expected(exact, False)
        with torch.no_grad():
            bound = self.expected(self.arguments(False, double=True), True)
        pool = [self.numbers.get(f"pool_{n}") for n in ("kernel_size", "stride", "padding")]
        relu = self.numbers["activation"] == "relu"
        value = pre.relu() if relu else pre
        dtype = self.tensors["input"].dtype
        u32 = unit_roundoff(torch.float64 if dtype is torch.float64 else torch.float32)
        relative = (2 * self.terms() + 40) * u32 + 6 * unit_roundoff(dtype)
        if self.name == "norm_conv_bn_act":  # h may be rounded the other way
            relative += 4 * unit_roundoff(dtype)
        error = bound.detach() * relative
        if pool[0] is not None:
            value = F.max_pool2d(value, *pool)
            error = F.max_pool2d(error, *pool)
        if output.shape != value.shape or output.dtype is not dtype:
            return "wrong shape", f"{tuple(output.shape)} {output.dtype}, {tuple(value.shape)}"
        got, want = output.detach(), value.detach()
        undecided = self.undecided()
        if undecided.any():  # and what a weight makes of zero is far from what it makes of little
            far = (~torch.isfinite(self.tensors["weight"])).double()
            unknown = conv_float64(undecided.double(), far, *self.geometry()) > 0
            want = torch.where(unknown, got.double(), want)
        as_zeros = self.as_zeros(got, want)
        want = torch.where(as_zeros, torch.nan, want)
        wrong = differs(got, want, error)
        if wrong:
            return "wrong number", wrong
        if self.grad and output.numel() and not as_zeros.any():
            # Where rounding may decide which way ReLU goes, or which value is a window's
            # largest, nothing is passed back.
            first, second, error = largest_two(pre.detach(), bound.detach() * relative, pool)
            clear = first - second > 2 * error
            if relu:
                clear &= first.abs() > 2 * error
            wrong = self.backward(output, value, clear, pre, relative, arguments, exact, undecided)
            if wrong:
                return "wrong gradient", wrong
        for tensor, old in zip(tensors, before, strict=True):
            if not same(tensor, old):
                return "input changed", str(tuple(tensor.shape))
        return "ok", None

    def backward(self, output, value, clear, pre, relative, arguments, exact, undecided):
        """What is wrong with the gradients of `output`, whose exact values are `value`."""
        import torch

        grad = torch.randn(output.shape, dtype=torch.float64).to(output.dtype)
        grad = torch.where(clear, grad, 0).to(output.dtype)
        output.backward(grad)
        if not torch.isfinite(pre).all():
            return None
        names = [k for k, v in exact.items() if v is not None and v.requires_grad]
        expected = torch.autograd.grad(
            value, [exact[n] for n in names], grad.double(), retain_graph=True
        )
        absolute = self.arguments(True, double=True)
        for n in names:
            # Above zero, where abs() has no slope.
            absolute[n] = absolute[n].detach().abs().clamp(min=1e-300).requires_grad_()
        magnitude = self.expected(absolute, True)
        # What arrives before the activation, of which the magnitudes' graph knows nothing: from
        # each of the windows that overlap there.
        (arriving,) = torch.autograd.grad(value, pre, grad.double().abs())
        sizes = torch.autograd.grad(magnitude, [absolute[n] for n in names], arriving)
        count = max(output.numel(), 1)
        # A batch's statistics, and a ReLU inside, pass back more than their magnitudes tell.
        inner = ("input", *IN_NORM) if self.name == "norm_conv_bn_act" else ()
        for n, want, size in zip(names, expected, sizes, strict=True):
            got = arguments[n].grad
            if got is None:
                return f"{n}: no gradient"
            room = size
            if self.numbers.get("training") or n in inner:
                room = size.abs().max() if size.numel() else torch.zeros(())
            if self.numbers.get("training"):
                room = room * (2 + 2 * math.sqrt(count)) + want.abs().max()
            limit = (room * (8 * relative + 4e-7 * math.sqrt(count))).expand(want.shape)
            if n == "input":
                want = torch.where(undecided, got.double(), want)
            wrong = differs(got, want, limit + 1e-6)
            if wrong:
                return f"{n}: {wrong}"
        return None


def largest_two(value: Any, error: Any, pool: Sequence[Any]) -> tuple[Any, Any, Any]:
    """The largest value of each window, the next (or -infinity), and the largest error in it.

    Without a pool each value is a window.
    """
    import torch
    import torch.nn.functional as F

    if pool[0] is None:
        return value, torch.full_like(value, -math.inf), error

    def windows(tensor: Any, outside: float) -> Any:
        kernel, stride, padding = map(pair, pool)
        around = (padding[1], padding[1], padding[0], padding[0])
        tensor = F.pad(tensor, around, value=outside)
        return tensor.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1]).flatten(4)

    values = windows(value, -math.inf)
    values = torch.cat([values, torch.full_like(values[..., :1], -math.inf)], -1)
    first, second = values.topk(2, -1).values.unbind(-1)
    return first, second, windows(error, 0).amax(-1)


def pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def same(a: Any, b: Any) -> bool:
    import torch

    return torch.equal(torch.nan_to_num(a.double(), 1e300), torch.nan_to_num(b.double(), 1e300))


def differs(got: Any, want: Any, limit: Any) -> str | None:
    """Where and by how much a tensor is not what it must be.

    NaN where NaN is wanted, infinity where infinity is; but what no finite value of the dtype is
    close to may be infinite.
    """
    import torch

    largest = torch.finfo(got.dtype).max
    got = got.double()
    finite = torch.isfinite(want) & torch.isfinite(limit) & (want.abs() + limit < largest)
    wrong = finite & ~((got - want).abs() <= limit + torch.finfo(torch.float16).smallest_normal)
    wrong |= torch.isnan(want) & ~torch.isnan(got)
    wrong |= torch.isinf(want) & torch.isfinite(limit) & (got != want)
    if not wrong.any():
        return None
    place = tuple(int(i) for i in wrong.nonzero()[0])
    return (
        f"{int(wrong.sum())} of {wrong.numel()} values, at {place} {float(got[place])}, must be "
        f"{float(want[place])} within {float(limit[place])}"
    )


def draw_public(rng: random.Random) -> Public:
    import torch

    name = rng.choice(
        ("conv_bn_act", "conv_bn_act", "norm_conv_bn_act", "conv_bn_act_max_pool", "batch_norm_act")
    )
    dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64))
    reduced = dtype in (torch.bfloat16, torch.float16)
    parameters = torch.float32 if reduced and rng.random() < 0.6 else dtype
    odd = rng.random() < 0.3
    layouts = LAYOUTS if rng.random() < 0.7 else ("contiguous", "channels_last")

    def tensor(*shape: int, dtype: Any = dtype, positive: bool = False) -> Any:
        values = torch.rand(shape) + 0.5 if positive else torch.randn(shape)
        values = values.to(dtype)
        if odd and values.numel() and rng.random() < 0.3 and not positive:
            places = torch.randint(values.numel(), (1 + values.numel() // 40,))
            values.view(-1)[places] = rng.choice((math.nan, math.inf, -math.inf))
        return laid_out(values, rng.choice(layouts), rng)

    def maybe(*shape: int, **how: Any) -> Any:
        return tensor(*shape, **how) if rng.random() < 0.6 else None

    def norm(channels: int) -> list[Any]:
        how = {"dtype": parameters}
        var = tensor(channels, positive=True, **how)
        if odd and rng.random() < 0.3:
            var = torch.where(torch.rand(channels) < 0.3, 0, var).to(parameters)
        return [tensor(channels, **how), var, maybe(channels, **how), maybe(channels, **how)]

    def eps() -> float:
        return 0.0 if odd and rng.random() < 0.3 else rng.choice((1e-5, 1e-3))

    activation = rng.choice(("relu", "none"))
    grad = rng.random() < 0.4
    if name == "batch_norm_act":
        dims = rng.choice((2, 3, 4, 4, 4, 5))
        C = rng.choice((1, 2, 3, 7, 8, 16, 17, 33, 64))
        spatial = [rng.randint(1, 9) for _ in range(dims - 2)]
        shape = [rng.randint(0 if odd else 1, 5), C, *spatial]
        training = rng.random() < 0.6 and shape[0] * math.prod(spatial) > 1
        mean, var, weight, bias = norm(C)
        x = tensor(*shape)
        if training:
            if not torch.isfinite(x).all():
                x = torch.nan_to_num(x, 1, 1, 1)
            # Channels of one value alone: their statistics say nothing about rounding.
            if x.stride()[0] == 0 or 0 in x.stride():
                x = x.contiguous() + torch.randn(shape).to(dtype)
            mean, var = (None, None) if rng.random() < 0.5 else (mean, var)
        tensors = dict(input=x, running_mean=mean, running_var=var, weight=weight, bias=bias)
        tensors["residual"] = maybe(*shape)
        numbers = dict(training=training, momentum=0.1, activation=activation)
        numbers["eps"] = 1e-3 if training else eps()
        return Public(name, tensors, numbers, grad)
    groups = rng.choice((1, 1, 1, 2, 4, 8))
    group_c = rng.choice((1, 1, 2, 3, 4, 8, 16))
    group_k = rng.choice((1, 1, 2, 4, 5, 8, 16, 17, 33))
    C, K = groups * group_c, groups * group_k
    R, S = (rng.choice((1, 1, 2, 3, 3, 5)) for _ in range(2))
    stride, dilation = ([rng.choice((1, 1, 2, 3)) for _ in range(2)] for _ in range(2))
    padding = [rng.choice((0, 0, 1, 2, 11)) for _ in range(2)]
    H, W = (
        max(rng.choice((1, 1, 2, 4, 7, 9, 14)), dilation[i] * (r - 1) + 1 - 2 * padding[i])
        for i, r in enumerate((R, S))
    )
    N = rng.choice((0, 1, 2, 3)) if odd else rng.choice((1, 2, 3))
    P, Q = (
        (size + 2 * p - d * (r - 1) - 1) // s + 1
        for size, p, d, r, s in zip((H, W), padding, dilation, (R, S), stride, strict=True)
    )
    tensors = {"input": tensor(N, C, H, W)}
    numbers: dict[str, Any] = {}
    if name == "norm_conv_bn_act":
        tensors.update(zip(IN_NORM, norm(C), strict=True))
        numbers["in_eps"] = eps()
    tensors["weight"] = tensor(K, group_c, R, S)
    keys = ("running_mean", "running_var", "bn_weight", "bn_bias")
    tensors.update(zip(keys, norm(K), strict=True))
    tensors["bias"] = maybe(K)
    numbers.update(eps=eps(), stride=stride, padding=padding, dilation=dilation, groups=groups)
    numbers["activation"] = activation
    if name == "conv_bn_act_max_pool":
        kernel = [rng.choice((1, 2, 3)) for _ in range(2)]
        pad = [k // 2 if rng.random() < 0.5 else 0 for k in kernel]
        kernel = [min(k, size + 2 * p) for k, size, p in zip(kernel, (P, Q), pad, strict=True)]
        pad = [min(p, k // 2) for p, k in zip(pad, kernel, strict=True)]
        kernel = [min(k, size + 2 * p) for k, size, p in zip(kernel, (P, Q), pad, strict=True)]
        numbers.update(pool_kernel_size=kernel, pool_padding=pad)
        numbers["pool_stride"] = [rng.choice((1, 2, 3)) for _ in range(2)]
    else:
        tensors["residual"] = maybe(N, K, P, Q)
    return Public(name, tensors, numbers, grad)


# ---- eight bits ----------------------------------------------------------------------------------


class Quantized:
    """Residual blocks or a stem in integers, valid, by one of the CPU's kernels."""

    def __init__(self, name: str, kernels: str, arguments: tuple[Any, ...], covered: bool) -> None:
        self.name, self.kernels, self.arguments, self.covered = name, kernels, arguments, covered

    def __str__(self) -> str:
        return f"{self.name} {self.kernels!r} {describe(self.arguments)}"

    def run(self) -> tuple[str, str | None]:
        import torch

        from fused_resnet import reference
        from fused_resnet.backends import cpu

        input = self.arguments[0]
        before = input.clone()
        expected = getattr(reference, self.name)(*self.arguments)
        call = {
            "quantized_residual_blocks": cpu.run_quantized_blocks,
            "quantized_pool_linear": cpu.run_quantized_head,
            "quantized_stem": cpu.run_quantized_stem,
        }[self.name]
        output = call(*self.arguments, self.kernels)
        if output is None:
            return "ok", "has no kernel" if self.covered else None
        if output.shape != expected.shape or output.dtype is not expected.dtype:
            wrong = f"{tuple(output.shape)} {output.dtype}, {tuple(expected.shape)}"
            return "wrong shape", wrong
        unlike = output != expected
        if unlike.any():
            place = tuple(int(i) for i in unlike.nonzero()[0])
            return "wrong bits", (
                f"{int(unlike.sum())} of {unlike.numel()} values, at {place} "
                f"{float(output[place])}, must be {float(expected[place])}"
            )
        same_input = torch.equal(torch.nan_to_num(input, 7), torch.nan_to_num(before, 7))
        return ("ok", None) if same_input else ("input changed", str(tuple(input.shape)))


def draw_quantized(rng: random.Random) -> Quantized:
    import torch

    kernels = rng.choice(torch.ops.fused_resnet.quantized_kernels().split(","))
    draw = rng.choices((_quantized_stem, _quantized_head, _quantized_blocks), (3, 1, 6))[0]
    return draw(rng, kernels)


def _byte_conv(rng: random.Random, C: int, K: int, filter: Any, groups: int, geometry: Any) -> Any:
    """A convolution whose outputs fill the range of a byte, or now and then leave it far behind."""
    import torch

    from fused_resnet.layers.quantized import QuantizedConv

    reduction = C // groups * filter[0] * filter[1]
    scale = torch.rand(K) / (math.sqrt(reduction) * 73) * rng.choice((1, 1, 1, 1, 1e12, 0))
    weight = torch.randint(-127, 128, (K, C // groups, *filter), dtype=torch.int8)
    if rng.random() < 0.1:
        weight.fill_(rng.choice((-127, 127)))
    return QuantizedConv(weight, scale, torch.randn(K) * 30, *geometry, groups)


def _float_images(rng: random.Random, *shape: int) -> Any:
    import torch

    x = (torch.randn(shape) * 3).to(_dtype(rng))
    if x.numel() and rng.random() < 0.2:
        places = torch.randint(x.numel(), (1 + x.numel() // 40,))
        x.view(-1)[places] = rng.choice((math.nan, math.inf, -math.inf, -0.0))
    return laid_out(x, rng.choice(LAYOUTS), rng)


def _quantized_blocks(rng: random.Random, kernels: str) -> Quantized:
    from fused_resnet.layers.quantized import Quantization, QuantizedBlock

    C, H, W = rng.choice((1, 3, 16, 20, 48, 64, 130)), *(rng.choice((1, 2, 5, 7, 16)) for _ in "HW")
    x = _float_images(rng, rng.choice((0, 1, 1, 2, 3)), C, H, W)
    blocks, covered = [], True
    for _ in range(rng.choice((1, 1, 2, 3))):
        convs, c, h, w = [], C, H, W
        count = rng.choice((1, 2, 2, 3))
        strided = rng.randrange(count) if rng.random() < 0.4 else count
        K = C if rng.random() < 0.5 else rng.choice((1, 5, 16, 33, 64, 96, 144))
        for i in range(count):
            groups = rng.choice((1, 1, 1, 2, 4, 5))
            k = K if i == count - 1 else rng.choice((1, 2, 4, 8, 12, 17, 33)) * groups
            groups = groups if c % groups == 0 and k % groups == 0 else 1
            filter = [rng.choice((1, 1, 3, 3, 5)) for _ in range(2)]
            dilation = [rng.choice((1, 1, 1, 2, 3)) for _ in range(2)]
            padding = [(f - 1) * d // 2 for f, d in zip(filter, dilation, strict=True)]
            stride = [rng.choice((1, 2, 3)), rng.choice((1, 2))] if i == strided else [1, 1]
            convs.append(_byte_conv(rng, c, k, filter, groups, (stride, padding, dilation)))
            c, h, w = k, -(-h // stride[0]), -(-w // stride[1])
        steps = convs[strided].stride if strided < count else [1, 1]
        projects = K != C or (h, w) != (H, W) or rng.random() < 0.1
        if projects:
            convs.append(_byte_conv(rng, C, K, (1, 1), 1, (steps, [0, 0], [1, 1])))
            covered &= list(convs[count - 1].stride) == [1, 1]
        blocks.append(QuantizedBlock(tuple(convs), projects, rng.choice((0.37, 1.0, 2.5))))
        C, H, W = c, h, w
    stored = Quantization(0.03999999910593033, rng.choice((0, 0, 1, 128, 255)))
    return Quantized(
        "quantized_residual_blocks", kernels, (x, blocks, stored, Quantization(0.125)), covered
    )


def _quantized_stem(rng: random.Random, kernels: str) -> Quantized:
    import torch

    from fused_resnet.layers.description import ConvNorm, Norm, Pool
    from fused_resnet.layers.quantized import Quantization, quantized_stem

    C, K = rng.choice((1, 2, 3, 3, 4, 5, 9, 12)), rng.choice((1, 16, 20, 48, 64, 80))
    filter = [rng.choice((1, 3, 5, 7)) for _ in range(2)]
    stride, dilation = ([rng.choice(some) for _ in range(2)] for some in ((1, 2, 3), (1, 1, 2)))
    padding = [rng.choice((0, 1, f // 2)) for f in filter]
    H, W = (
        max(rng.choice((1, 5, 8, 20, 33)), d * (f - 1) + 1 - 2 * p)
        for f, d, p in zip(filter, dilation, padding, strict=True)
    )
    sizes = [
        (size + 2 * p - d * (f - 1) - 1) // s + 1
        for size, f, s, p, d in zip((H, W), filter, stride, padding, dilation, strict=True)
    ]
    kernel = [min(rng.choice((1, 2, 3)), size) for size in sizes]
    pool = Pool(kernel, [rng.choice((1, 2, 3)) for _ in kernel], [k // 2 for k in kernel])
    bits = rng.choice((8, 16))
    mean, var, scale, shift = _vectors(4, K)
    output = Quantization(2.0**-5)
    input = Quantization(2.0**-13, 128) if bits == 16 else Quantization(2.0**-5, 117)
    norm = Norm(mean - 0.5, var, scale, shift - 0.5, 1e-5)
    layer = ConvNorm(torch.randn(K, C, *filter), norm, None, stride, padding, dilation, 1)
    x = _float_images(rng, rng.choice((0, 1, 2)), C, H, W)
    stem = quantized_stem(layer, pool, bits, input, output)
    return Quantized("quantized_stem", kernels, (x, stem, input, output), True)


def _quantized_head(rng: random.Random, kernels: str) -> Quantized:
    import torch

    from fused_resnet.layers.quantized import Quantization, quantized_linear

    C, K = rng.choice((1, 3, 16, 63, 64, 65, 260, 600)), rng.choice((1, 5, 16, 33))
    H, W = (rng.choice((1, 2, 5, 7, 16)) for _ in range(2))
    x = _float_images(rng, rng.choice((0, 1, 2, 8, 9)), C, H, W)
    stored, pooled = Quantization(2.0**-5), Quantization(rng.choice((2.0**-7, 0.013, 1e-30)))
    bias = torch.randn(K) if rng.random() < 0.7 else None
    linear = quantized_linear(torch.randn(K, C), bias, pooled)
    return Quantized("quantized_pool_linear", kernels, (x, linear, stored, pooled), True)


# ---- registered operators ------------------------------------------------------------------------

NUMBERS = (
    -(2**63), -(2**31), -1, 0, 1, 2, 3, 7, 1025, 2**28, 2**31 - 1, 2**31, 2**40, 2**61, 2**62,
    2**63 - 1,
)  # fmt: skip
FLOATS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-5, 1e308)
# What a program raises that did not expect its arguments.
UNEXPECTED = (
    ZeroDivisionError, AttributeError, IndexError, KeyError, AssertionError, UnboundLocalError,
    SystemError, RecursionError,
)  # fmt: skip


class Raw:
    """One call of a registered operator, with arguments that need not be valid."""

    def __init__(
        self,
        name: str,
        arguments: list[Any],
        changed: Sequence[str],
        inference: bool = False,
        fake: bool = False,
    ) -> None:
        self.name, self.arguments, self.changed = name, arguments, changed
        self.inference, self.fake = inference, fake

    def __str__(self) -> str:
        how = f"inference={self.inference} fake={self.fake}"
        return (
            f"{self.name}: {'; '.join(self.changed)} {how}\n{[describe(a) for a in self.arguments]}"
        )

    def run(self) -> tuple[str, str | None]:
        import torch

        operator = getattr(torch.ops.fused_resnet, self.name)
        try:
            with torch.inference_mode(self.inference):
                output = operator(*self.arguments)
        except UNEXPECTED as error:
            return f"raises {type(error).__name__}", str(error)
        except Exception as error:
            if not self.changed and "has neither AVX2 nor AVX-512" not in str(error):
                return "refuses valid arguments", f"{type(error).__name__}: {error}"
            outcome, output = type(error).__name__, None
        else:
            outcome = "ok"
        if self.fake:
            wrong = self.as_fake(operator, output)
            if wrong is not None:
                return "wrong fake kernel", wrong
        return outcome, None

    def as_fake(self, operator: Any, output: Any) -> str | None:
        """What is wrong with what the operator's fake kernel says of its output."""
        import torch
        from torch.utils._pytree import tree_leaves, tree_map

        meta = tree_map(
            lambda a: a.to("meta") if isinstance(a, torch.Tensor) else a, self.arguments
        )
        try:
            with torch.inference_mode(self.inference):
                fake = operator(*meta)
        except UNEXPECTED as error:
            return f"{type(error).__name__}: {error}"
        except Exception as error:
            if output is None or isinstance(error, NotImplementedError):  # none is registered
                return None
            return f"{type(error).__name__}: {error}"
        if output is None:
            return None
        # Not strides: on meta torch's convolution has some of its own.
        got, want = (
            [(t.shape, t.dtype) if isinstance(t, torch.Tensor) else t for t in o]
            for o in (tree_leaves(fake), tree_leaves(output))
        )
        return None if got == want else f"{got}, the kernel {want}"


def describe(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype)[6:]}{tuple(value.shape)}/{value.layout}"
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    return value


def draw_raw(rng: random.Random) -> Raw:
    name = rng.choice(sorted(OPERATORS))
    arguments = OPERATORS[name](rng)
    changed: list[str] = []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        place = rng.randrange(len(arguments))
        arguments[place], what = hostile(arguments[place], rng)
        changed.append(f"argument {place} {what}")
    return Raw(name, arguments, changed, rng.random() < 0.2, rng.random() < 0.2)


def hostile(value: Any, rng: random.Random) -> tuple[Any, str]:
    """Something in the place of `value`, of a kind that gets past the schema."""
    import torch

    if isinstance(value, torch.Tensor):
        return hostile_tensor(value, rng)
    if isinstance(value, bool):
        return not value, "negated"
    if isinstance(value, int):
        number = rng.choice(NUMBERS)
        return number, f"is {number}"
    if isinstance(value, float):
        number = rng.choice(FLOATS)
        return number, f"is {number}"
    if isinstance(value, str):
        return rng.choice(("gelu", "", "relu", "none", "baseline")), "another string"
    if isinstance(value, list):
        kind = rng.randrange(4)
        if kind == 0 and value:
            return value[:-1], "is shorter"
        if kind == 1 and value:
            return [*value, value[-1]], "is longer"
        if kind == 2:
            return [], "is empty"
        if value:
            place = rng.randrange(len(value))
            changed, what = hostile(value[place], rng)
            return [*value[:place], changed, *value[place + 1 :]], f"[{place}] {what}"
        return value, "unchanged"
    if value is None:
        return rng.choice((None, torch.ones(3), torch.ones(8), torch.ones(2, 8, 5, 5))), "is there"
    return value, "unchanged"


def hostile_tensor(tensor: Any, rng: random.Random) -> tuple[Any, str]:
    import torch

    kind = rng.choice(
        ("dtype", "dtype", "rank", "size", "size", "empty", "layout", "huge", "none", "sparse",
         "meta", "grad", "strides")
    )  # fmt: skip
    if tensor.layout is not torch.strided or tensor.device.type == "meta" or tensor.numel() > 2**20:
        return tensor, "unchanged"
    if kind == "dtype":
        dtype = rng.choice(
            (torch.uint8, torch.int8, torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn,
             torch.float16, torch.bfloat16, torch.float32, torch.float64)
        )  # fmt: skip
        return tensor.to(dtype), f"is {dtype}"
    if kind == "rank":
        return (
            (tensor.unsqueeze(0) if rng.random() < 0.5 else tensor.flatten()),
            "is of another rank",
        )
    if kind in ("size", "empty", "huge"):
        if tensor.dim() == 0:
            return tensor, "unchanged"
        dim = rng.randrange(tensor.dim())
        size = 0 if kind == "empty" else max(0, tensor.size(dim) + rng.choice((-1, 1, 8)))
        if kind == "huge":
            size = rng.choice((2**20, 2**31, 2**40, 2**60))
        shape = list(tensor.shape)
        shape[dim] = size
        if kind == "huge":
            # Nothing that fits the memory, and takes minutes. torch multiplies sizes before a zero.
            elements = math.prod(size or 1 for size in shape)
            if elements >= 2**62 or 2**24 < elements < 2**36:
                return tensor, "unchanged"
            part = tensor.narrow(dim, 0, min(1, tensor.size(dim)))
            if part.size(dim) == 0:
                return tensor, "unchanged"
            return part.expand(shape), f"is {size} long"
        return torch.zeros(shape, dtype=tensor.dtype), f"is {size} long"
    if kind == "layout" and tensor.dim() and tensor.dtype.is_floating_point:
        layout = rng.choice(LAYOUTS)
        try:
            return laid_out(tensor, layout, rng), f"is {layout}"
        except RuntimeError:
            return tensor, "unchanged"
    if kind == "strides" and tensor.dim():
        # A dimension of one element may have any stride.
        place = rng.randrange(tensor.dim())
        shape, strides = list(tensor.shape), list(tensor.stride())
        if 0 in shape:
            return tensor, "unchanged"
        shape[place], strides[place] = 1, rng.choice((0, 1, 2**40, 2**61))
        return tensor.as_strided(shape, strides), f"has the stride {strides[place]}"
    if kind == "none":
        return None, "is missing"
    if kind == "sparse" and tensor.dim() and tensor.dtype.is_floating_point:
        return tensor.float().to_sparse(), "is sparse"
    if kind == "meta":
        return tensor.to("meta"), "is on meta"
    if kind == "grad" and tensor.dtype.is_floating_point:
        return tensor.detach().requires_grad_(), "requires a gradient"
    return tensor, "unchanged"


def _dtype(rng: random.Random) -> Any:
    import torch

    return rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))


def _image(rng: random.Random, *shape: int, dtype: Any, last: bool | None = None) -> Any:
    import torch

    last = rng.random() < 0.5 if last is None else last
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)


def _vectors(count: int, channels: int, dtype: Any = None) -> list[Any]:
    import torch

    return [torch.rand(channels, dtype=dtype or torch.float32) + 0.5 for _ in range(count)]


def _convolution(rng: random.Random, dtype: Any = None) -> dict[str, Any]:
    """A valid convolution's parts."""
    import torch

    dtype = dtype or _dtype(rng)
    groups = rng.choice((1, 1, 2, 8))
    C, K, R = 8, rng.choice((8, 16, 24)), rng.choice((1, 3))
    stride, H = rng.choice((1, 2)), rng.choice((4, 5))
    P = (H + 2 * (R // 2) - R) // stride + 1
    mean, var, bn_weight, bn_bias = _vectors(4, K)
    return dict(
        input=_image(rng, 2, C, H, H, dtype=dtype),
        weight=torch.randn(K, C // groups, R, R).to(dtype),
        norm=[mean, var, bn_weight, bn_bias],
        eps=1e-5,
        bias=torch.randn(K).to(dtype) if rng.random() < 0.5 else None,
        stride=stride,
        padding=R // 2,
        groups=groups,
        residual=_image(rng, 2, K, P, P, dtype=dtype) if rng.random() < 0.5 else None,
        size=(K, R, P),
    )


def _public_conv(rng: random.Random) -> list[Any]:
    c = _convolution(rng)
    geometry = [[c["stride"]] * 2, [c["padding"]] * 2, [1, 1], c["groups"]]
    return [c["input"], c["weight"], *c["norm"], c["eps"], c["bias"], *geometry]


def _conv_bn_act(rng: random.Random) -> list[Any]:
    arguments = _public_conv(rng)
    return [*arguments, None, rng.choice(("relu", "none", "silu", "leaky_relu(0.2)", "gelu"))]


def _conv_bn_act_max_pool(rng: random.Random) -> list[Any]:
    activation = rng.choice(("relu", "hardswish", "relu6"))
    return [*_public_conv(rng), activation, [2, 2], [2, 2], [1, 1]]


def _norm_conv_bn_act(rng: random.Random) -> list[Any]:
    x, *rest = _conv_bn_act(rng)
    return [x, *_vectors(4, x.size(1)), 1e-5, *rest]


def _packed_conv(rng: random.Random) -> tuple[list[Any], list[Any], dict[str, Any]]:
    import torch

    c = _convolution(rng)
    if torch.ops.fused_resnet.conv_isa():
        packed = torch.ops.fused_resnet.pack_conv_weight(c["weight"], c["groups"])
    else:
        packed = torch.zeros(c["weight"].numel())
    numbers = [c["stride"]] * 2 + [c["padding"]] * 2 + [1, 1, c["groups"]]
    head = [c["weight"], packed, *c["norm"], c["eps"], c["bias"], *numbers]
    act = [rng.randrange(8), rng.choice((0.0, 0.1, -1.0)), rng.choice((0.0, 1.0, 6.0))]
    return [c["input"]], [*head, c["residual"], *act], c


def _conv_bn_act_packed(rng: random.Random) -> list[Any]:
    first, rest, c = _packed_conv(rng)
    if c["groups"] == 1 and rng.random() < 0.5:
        rest[-4] = None
        return [*first, *rest, [2, 2, 2, 2, 1, 1]]
    return [*first, *rest, []]


def _norm_conv_bn_act_packed(rng: random.Random) -> list[Any]:
    first, rest, _ = _packed_conv(rng)
    return [*first, *_vectors(4, first[0].size(1)), 1e-5, *rest]


def _block_parts(rng: random.Random, per_layer: int, packed: bool) -> list[Any]:
    import torch

    dtype = _dtype(rng)
    channels, tensors = 16, []
    numbers: list[int] = []
    for _ in range(2):
        weight = torch.randn(channels, channels, 3, 3).to(dtype)
        mean, var, bn_weight, bn_bias = _vectors(4, channels)
        bias = torch.randn(channels).to(dtype)
        if packed:
            copy = torch.zeros(channels * channels * 9)
            if torch.ops.fused_resnet.conv_isa():
                copy = torch.ops.fused_resnet.pack_conv_weight(weight, 1)
            tensors += [weight, copy, mean, var, bn_weight, bn_bias, bias]
        elif per_layer == 4:
            tensors += [weight, bias, bn_weight, bn_bias]
        else:
            tensors += [weight, mean, var, bn_weight, bn_bias, bias]
        numbers += [1, 1, 1, 1, 1, 1, 1]
    return [_image(rng, 2, channels, 5, 4, dtype=dtype), tensors, numbers, [1e-5, 1e-5]]


def _residual_blocks(rng: random.Random) -> list[Any]:
    return [*_block_parts(rng, 6, False), [2], [False]]


def _residual_blocks_packed(rng: random.Random) -> list[Any]:
    return [*_block_parts(rng, 7, True), [2], [0]]


def _block_training(rng: random.Random) -> list[Any]:
    return [*_block_parts(rng, 4, False), False, rng.random() < 0.5]


def _block_training_backward(rng: random.Random) -> list[Any]:
    import torch

    x, parameters, *description = _block_training(rng)
    with torch.no_grad():
        output, *kept = torch.ops.fused_resnet.block_training(x, parameters, *description)
    need = [True] * (1 + len(parameters))
    return [torch.randn_like(output), x, output, parameters, kept, need, *description]


def _stem_training(rng: random.Random) -> list[Any]:
    x, parameters, numbers, _ = _block_parts(rng, 4, False)
    return [x, parameters[:4], numbers[:7], 1e-5, [3, 3, 2, 2, 1, 1]]


def _stem_training_backward(rng: random.Random) -> list[Any]:
    import torch

    x, parameters, *description = _stem_training(rng)
    with torch.no_grad():
        output, *kept = torch.ops.fused_resnet.stem_training(x, parameters, *description)
    return [torch.randn_like(output), x, parameters, kept, [True] * 5, *description]


def _norm_input(rng: random.Random) -> tuple[Any, int]:
    import torch

    dtype = rng.choice((torch.float32, torch.float64, torch.bfloat16, torch.float16))
    C = rng.choice((3, 8, 16, 64))
    return _image(rng, 3, C, 4, rng.choice((4, 5)), dtype=dtype), C


def _accumulated(x: Any) -> Any:
    import torch

    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _batch_norm_act_inference(rng: random.Random) -> list[Any]:
    x, C = _norm_input(rng)
    return [x, *_vectors(4, C, _accumulated(x)), 1e-5, x.clone(), "relu"]


def _batch_norm_act_training(rng: random.Random) -> list[Any]:
    x, C = _norm_input(rng)
    return [x, *_vectors(2, C, _accumulated(x)), 1e-5, x.clone(), "relu"]


def _backward_parts(rng: random.Random) -> tuple[list[Any], Any]:
    x, C = _norm_input(rng)
    weight, bias, mean, var = _vectors(4, C, _accumulated(x))
    output = x.clone() if rng.random() < 0.5 else None
    return [x.clone(), x, output, weight, bias, mean, var, 1e-5, True], x


def _batch_norm_act_backward(rng: random.Random) -> list[Any]:
    parts, x = _backward_parts(rng)
    return [*parts, rng.random() < 0.5, x.clone(), x.clone()]


def _batch_norm_act_backward_sums(rng: random.Random) -> list[Any]:
    return _backward_parts(rng)[0]


def _batch_norm_act_backward_input(rng: random.Random) -> list[Any]:
    parts, x = _backward_parts(rng)
    return [*parts, *_vectors(2, x.size(1), _accumulated(x)), 30.0, x.clone()]


# The activations' numbers, of which there are eight, and what they take.
def _act(rng: random.Random) -> list[Any]:
    return [rng.randrange(8), rng.uniform(-1.0, 1.0), rng.uniform(0.0, 6.0)]


def _without_float64(arguments: list[Any]) -> list[Any]:
    import torch

    return [
        a.float() if isinstance(a, torch.Tensor) and a.dtype is torch.float64 else a
        for a in arguments
    ]


def _normalize_act(rng: random.Random) -> list[Any]:
    x, C = _norm_input(rng)
    weight, bias, mean, var = _vectors(4, C, _accumulated(x))
    residual = x.clone() if rng.random() < 0.5 else None
    arguments = [x, mean, var, weight, bias, 1e-5, residual, *_act(rng), x.clone()]
    return _without_float64(arguments)


def _normalize_act_backward(rng: random.Random) -> list[Any]:
    (*parts, _), x = _backward_parts(rng)
    return _without_float64([*parts, *_act(rng), rng.random() < 0.5, x.clone(), x.clone()])


def _train_batch_norm_act(rng: random.Random) -> list[Any]:
    return [*_batch_norm_act_training(rng), rng.random() < 0.5]


def _norm_vectors(rng: random.Random) -> list[Any]:
    return [*_vectors(4, 8), 1e-5]


def _scale_shift_act(rng: random.Random) -> list[Any]:
    x, C = _norm_input(rng)
    residual = x[:, : rng.randint(1, C)].clone()
    return [x, *_vectors(2, C, _accumulated(x)), residual, "relu"]


def _conv_input_gradient(rng: random.Random) -> list[Any]:
    import torch

    dtype = _dtype(rng)
    R = rng.choice((1, 3))
    stride = 2 if R == 1 and rng.random() < 0.5 else 1
    P = (5 - 1) // stride + 1 if R == 1 else 5
    grad = _image(rng, 2, 16, P, P, dtype=dtype)
    weight = torch.randn(16, 8, R, R).to(dtype)
    out = _image(rng, 2, 8, 5, 5, dtype=dtype)
    return [grad, weight, stride, stride, R // 2, R // 2, 1, 1, out, rng.random() < 0.5]


def _max_pool_gradient(rng: random.Random) -> list[Any]:
    dtype = _dtype(rng)
    x = _image(rng, 2, 8, 6, 6, dtype=dtype, last=True)
    grad = _image(rng, 2, 8, 3, 3, dtype=dtype, last=True)
    return [grad, x, *_vectors(2, 8), [3, 3, 2, 2, 1, 1]]


def _pool_linear(rng: random.Random) -> list[Any]:
    import torch

    dtype = _dtype(rng)
    x = _image(rng, 2, 24, 5, 5, dtype=dtype)
    return [x, torch.randn(10, 24).to(dtype), torch.randn(10).to(dtype)]


def _packed_bytes(
    rng: random.Random, shape: tuple[int, int, int], groups: int, unit: int, kernels: str
) -> tuple[Any, list[int]]:
    """A packed convolution of K, C, R, and its numbers as the operators have them."""
    import torch

    K, C, R = shape
    conv = _byte_conv(rng, C, K, (R, R), groups, ((1, 1), (R // 2, R // 2), (1, 1)))
    packed = torch.ops.fused_resnet.pack_quantized_conv(
        conv.weight, conv.scale, conv.shift, 1, groups, unit, kernels
    )
    return packed, [*conv.weight.shape, 1, 1, R // 2, R // 2, 1, 1, groups]


def _pack_quantized_conv(rng: random.Random) -> list[Any]:
    C, groups, unit = rng.choice(((8, 1, 16), (8, 2, 16), (3, 1, 3), (6, 1, 6)))
    conv = _byte_conv(rng, C, 8, (3, 3), groups, ((1, 1), (1, 1), (1, 1)))
    return [conv.weight, conv.scale, conv.shift, rng.choice((1, 2)), groups, unit, _kernels(rng)]


def _kernels(rng: random.Random) -> str:
    import torch

    return rng.choice(("", *torch.ops.fused_resnet.quantized_kernels().split(",")))


def _quantized_residual_blocks_packed(rng: random.Random) -> list[Any]:
    kernels = _kernels(rng)
    first, numbers = _packed_bytes(rng, (24, 16, 3), rng.choice((1, 2)), 16, kernels)
    second, more = _packed_bytes(rng, (16, 24, 1), 1, 16, kernels)
    x = _image(rng, 2, 16, 5, 7, dtype=_dtype(rng))
    shape = [[first, second], numbers + more, [2], [0], [0.5]]
    return [x, *shape, 0.1, rng.choice((0, 9)), 0.1, kernels]


def _quantized_stem_packed(rng: random.Random) -> list[Any]:
    words = rng.random() < 0.5
    C = 6 if words else 3
    kernels = _kernels(rng)
    packed, numbers = _packed_bytes(rng, (16, C, 3), 1, C, kernels)
    low = _packed_bytes(rng, (16, C, 3), 1, C, kernels)[0] if words else None
    x = _image(rng, 2, 3, 7, 6, dtype=_dtype(rng))
    return [x, packed, low, numbers, [3, 3, 2, 2, 1, 1], 0.1, 128, 0.1, kernels]


def _quantized_pool_linear(rng: random.Random) -> list[Any]:
    import torch

    x = _image(rng, 2, 16, 5, 7, dtype=_dtype(rng))
    weight = torch.randint(-127, 128, (9, 16), dtype=torch.int8)
    return [x, weight, *_vectors(2, 9), 0.1, 0.05, _kernels(rng)]


def _squeeze_excitation(rng: random.Random) -> list[Any]:
    import torch

    dtype, C, R = _dtype(rng), rng.choice((3, 24, 40)), rng.choice((1, 8, 17))
    reduce = [torch.randn(R, C, 1, 1).to(dtype), *_vectors(1, R, dtype)]
    expand = [torch.randn(C, R, 1, 1).to(dtype), None]
    x = _image(rng, 3, C, 5, 7, dtype=dtype)
    return [x, *reduce, *expand, rng.randint(0, 7), 0.1, 0.5, rng.randint(0, 1)]


def _pool_linear_int8(rng: random.Random) -> list[Any]:
    import torch

    x = _image(rng, 2, 16, 5, 7, dtype=_dtype(rng))
    bias = torch.randn(9) if rng.random() < 0.7 else None
    return [x, torch.randn(9, 16).to(_dtype(rng)), bias, 0.1, 0.05]


def _quantized_copies_match(rng: random.Random) -> list[Any]:
    import torch

    from fused_resnet.layers.quantized import quantized_weight

    weight = torch.randn(8, 4, 3, 3).to(_dtype(rng))
    bytes, step = quantized_weight(weight)
    vectors = [*_vectors(2, 8), weight.clone()]
    return [[weight], [bytes], [step], vectors, [vector.clone() for vector in vectors]]


OPERATORS: dict[str, Callable[[random.Random], list[Any]]] = {
    "batch_norm_act_backward": _batch_norm_act_backward,
    "batch_norm_act_backward_input": _batch_norm_act_backward_input,
    "batch_norm_act_backward_sums": _batch_norm_act_backward_sums,
    "batch_norm_act_inference": _batch_norm_act_inference,
    "batch_norm_act_training": _batch_norm_act_training,
    "batch_statistics": lambda rng: [_norm_input(rng)[0]],
    "block_training": _block_training,
    "block_training_backward": _block_training_backward,
    "conv_bn_act": _conv_bn_act,
    "conv_bn_act_max_pool": _conv_bn_act_max_pool,
    "conv_bn_act_packed": _conv_bn_act_packed,
    "conv_input_gradient": _conv_input_gradient,
    "max_pool_gradient": _max_pool_gradient,
    "norm_conv_bn_act": _norm_conv_bn_act,
    "norm_conv_bn_act_packed": _norm_conv_bn_act_packed,
    "norm_vectors": _norm_vectors,
    "normalize_act": _normalize_act,
    "normalize_act_backward": _normalize_act_backward,
    "pack_conv_weight": lambda rng: [_convolution(rng)["weight"], 1],
    "pack_quantized_conv": _pack_quantized_conv,
    "pool_empty_like": lambda rng: [_norm_input(rng)[0]],
    "pool_linear": _pool_linear,
    "pool_linear_int8": _pool_linear_int8,
    "quantized_copies_match": _quantized_copies_match,
    "quantized_pool_linear": _quantized_pool_linear,
    "quantized_residual_blocks_packed": _quantized_residual_blocks_packed,
    "quantized_stem_packed": _quantized_stem_packed,
    "residual_blocks": _residual_blocks,
    "residual_blocks_packed": _residual_blocks_packed,
    "squeeze_excitation": _squeeze_excitation,
    "scale_shift_act": _scale_shift_act,
    "stem_training": _stem_training,
    "stem_training_backward": _stem_training_backward,
    "train_batch_norm_act": _train_batch_norm_act,
}


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=3000, help="how many (default: 3000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the first call's index")
    kinds = ("all", "public", "quantized", "networks", "raw")
    parser.add_argument("--kinds", choices=kinds, default="all")
    parser.add_argument("--isa", choices=("all", *ISAS), default="all", help="instruction set")
    parser.add_argument("--sanitize", action="store_true", help="build and run with sanitizers")
    parser.add_argument("--timeout", type=float, default=120, help="seconds a call may take")
    parser.add_argument("--threads", type=int, default=2, help="of each call (default: 2)")
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    options = parsed()
    if options.result is None:
        return run_all(options)
    run = Run(options)
    run.all()
    options.result.write_text(json.dumps({"findings": run.findings, "outcomes": run.outcomes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
