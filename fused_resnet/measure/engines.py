"""What `bench models` compares: this package's ways, torch.compile's, CUDA graphs, other engines.

OpenVINO and ONNX Runtime get the same weights and input as eager PyTorch, the same number of
threads, one stream, and the precision of the case spelled out: OpenVINO otherwise picks bfloat16 or
float16 by itself on CPUs that have them, and would win a float32 comparison by not running it. In
eight bits they get the calibration images of ours: OpenVINO through NNCF's post-training
quantization, ONNX Runtime through its static quantization, each with its own default settings.

Threads: PyTorch's OpenMP workers, OpenVINO's TBB workers and ONNX Runtime's own pool may all spin
for a few milliseconds after their work, on the cores that the next candidate needs. So `SETTLE`
seconds are slept before each timed call; the CPU time a process uses in such a pause showed that
all of them have stopped well before it ends. ONNX Runtime is told to stop spinning when a run
ends as well. All candidates of a run pay the same pause.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import backends, swap
from ..modules import quantized
from ..quantization import quantize
from .case import Call, Case, Engine
from .inputs import calibration_images
from .step import step

SETTLE = 0.05
CALIBRATION_BATCH = 8


def eager(model: torch.nn.Module, input: torch.Tensor, case: Case) -> Call:
    """The model as torchvision has it."""
    return step(model, model, input, case)


def compiled(model: torch.nn.Module, input: torch.Tensor, case: Case) -> Call:
    """The model under `torch.compile` with its default options."""
    return step(model, torch.compile(model), input, case)


def fused(
    model: torch.nn.Module,
    input: torch.Tensor,
    case: Case,
    wrap: Callable[[torch.nn.Module], Callable[..., torch.Tensor]] = lambda model: model,
    memory: str = "normal",
) -> Call:
    """The model after `fuse`, on the case's backend; `wrap` makes what is called of it."""
    call = step(model, wrap(swap.fuse(model, memory=memory)), input, case)
    backend = case.backend
    if backend is None:
        return call

    def on_backend() -> torch.Tensor:
        with backends.use_backend(backend):
            return call()

    return on_backend


def in_eight_bits(
    model: torch.nn.Module,
    input: torch.Tensor,
    case: Case,
    stem: str | None = None,
    classifier: str = "float",
) -> Call:
    """The model after `quantize`, calibrated as the case says; of one without blocks, `fused`."""
    if case.train:
        raise NotImplementedError("runs inference only")
    if any(quantized.is_quantizable(module) for module in swap.fuse(model).modules()):
        batches = (part.to(input) for part in _calibration_batches(case))
        dtype = case.quantize or "int8"
        quantize(model, batches, dtype=dtype, stem=stem, classifier=classifier)
    return fused(model, input, case)


def _calibration_batches(case: Case) -> Sequence[torch.Tensor]:
    images = calibration_images(case.model, case.calibrate, case.images, case.seed)
    return images.split(CALIBRATION_BATCH)


def openvino(
    model: torch.nn.Module, input: torch.Tensor, case: Case, eight_bits: bool = False
) -> Call:
    """OpenVINO's CPU plugin, latency hint, on the model converted from PyTorch directly.

    Parameters are those of `model`, so in bfloat16 they are rounded already; OpenVINO takes them as
    float32 and rounds to the precision of the hint, which loses nothing.
    """
    import openvino as ov

    if case.train or input.device.type != "cpu":
        raise NotImplementedError("runs inference on the CPU only")
    # Converting a model reports usage over the network otherwise.
    os.environ.setdefault("OPENVINO_TELEMETRY_OPT_OUT", "1")
    wide, example = model.float(), input.float().contiguous()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        shape = [-1, *example.shape[1:]] if eight_bits else [*example.shape]
        converted = ov.convert_model(wide, example_input=example, input=[tuple(shape)])
        if eight_bits:
            converted = _by_nncf(converted, case)
            converted.reshape(list(example.shape))
    precision = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[case.dtype]
    compiled = ov.Core().compile_model(
        converted,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        },
    )
    request = compiled.create_infer_request()
    array = example.numpy()

    def call() -> torch.Tensor:
        # Shared memory is not owned by OpenVINO: holding `array` here is what keeps it alive.
        request.set_input_tensor(ov.Tensor(array, shared_memory=True))
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data.copy())

    return call


def _by_nncf(converted: Any, case: Case) -> Any:
    """A converted model quantized on the images that ours are calibrated on."""
    import nncf

    batches = [part.contiguous().numpy() for part in _calibration_batches(case)]
    logging.getLogger("nncf").setLevel(logging.ERROR)
    # Its progress bars are not ours to show.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return nncf.quantize(converted, nncf.Dataset(batches), subset_size=len(batches))


def onnx_runtime(
    model: torch.nn.Module, input: torch.Tensor, case: Case, eight_bits: bool = False
) -> Call:
    """ONNX Runtime's CPU provider, all graph optimisations on; it has no bfloat16 convolution."""
    import onnxruntime

    if case.train or input.device.type != "cpu":
        raise NotImplementedError("runs inference on the CPU only")
    if case.dtype != "float32":
        raise NotImplementedError(f"its CPU provider has no {case.dtype} convolution")
    example = input.contiguous()
    exported = io.BytesIO()
    axes = {"input": {0: "batch"}, "logits": {0: "batch"}} if eight_bits else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # The exporter built on torch.export needs another package and gives the same graph here.
        torch.onnx.export(
            model,
            (example,),
            exported,  # type: ignore[arg-type]  # this exporter takes a file, too
            dynamo=False,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes=axes,
        )
    content = exported.getvalue()
    if eight_bits:
        content = _statically(content, case)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name, array = session.get_inputs()[0].name, example.numpy()

    def call() -> torch.Tensor:
        (logits,) = session.run(None, {name: array})
        return torch.from_numpy(logits)

    return call


def _statically(content: bytes, case: Case) -> bytes:
    """An exported model after ONNX Runtime's static quantization, on the images of ours.

    Activations unsigned, weights signed with a step a filter, as its documentation advises for x86
    with VNNI.
    """
    from onnxruntime import quantization

    batches = iter([{"input": part.contiguous().numpy()} for part in _calibration_batches(case)])

    class Reader(quantization.CalibrationDataReader):
        def get_next(self) -> dict[str, Any] | None:
            return next(batches, None)

    with tempfile.TemporaryDirectory() as folder:
        source, prepared, written = (os.path.join(folder, f"{i}.onnx") for i in range(3))
        Path(source).write_bytes(content)
        quantization.quant_pre_process(source, prepared, skip_symbolic_shape=True)
        logging.getLogger().disabled, before = True, logging.getLogger().disabled
        try:
            quantization.quantize_static(
                prepared,
                written,
                Reader(),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
        finally:
            logging.getLogger().disabled = before
        return Path(written).read_bytes()


def compiled_frozen(model: torch.nn.Module, input: torch.Tensor, case: Case) -> Call:
    """`torch.compile` with Inductor's freezing: weights are constants, folded and prepacked."""
    if case.train:
        raise NotImplementedError("freezing is for inference")
    if input.device.type != "cpu":
        raise NotImplementedError("is a candidate on the CPU only")
    frozen = torch.compile(model)

    @torch.no_grad()
    def call() -> torch.Tensor:
        return frozen(input)

    # Dynamo asks the global option, not torch.compile's `options`, whether parameters are
    # constants.
    with torch._inductor.config.patch(freezing=True):
        call()
    return call


def compiled_mode(mode: str) -> Engine:
    """The engine of `torch.compile` in one of its modes."""

    def engine(model: torch.nn.Module, input: torch.Tensor, case: Case) -> Call:
        if input.device.type != "cuda":
            raise NotImplementedError("is a candidate on a GPU only")
        return step(model, torch.compile(model, mode=mode), input, case)

    return engine


def graphed(engine: Engine) -> Engine:
    """Another engine's call, captured as a CUDA graph: without the host's share of the time."""

    def build(model: torch.nn.Module, input: torch.Tensor, case: Case) -> Call:
        if case.train or input.device.type != "cuda":
            raise NotImplementedError("is a candidate for inference on a GPU only")
        return capture(engine(model, input, case), input.device)

    return build


def capture(call: Call, device: torch.device, warmup: int = 3) -> Call:
    """A call that replays `call`, whose result is then overwritten by the next replay."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warmup):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def fused_low_memory(model: torch.nn.Module, input: torch.Tensor, case: Case) -> Call:
    """The fused model that keeps less for the backward pass and computes more."""
    if not case.train:
        raise NotImplementedError("differs in training only")
    return fused(model, input, case, memory="low")


def fused_compiled(model: torch.nn.Module, input: torch.Tensor, case: Case) -> Call:
    """The fused model under `torch.compile`, which sees our operators."""
    return fused(model, input, case, wrap=torch.compile)


INT8, FLOAT8 = "fused, int8", "fused, float8_e4m3fn"
ENGINES: dict[str, Engine] = {
    "eager": eager,
    INT8: in_eight_bits,
    FLOAT8: in_eight_bits,
    "torch.compile": compiled,
    "fused": fused,
    "fused, low memory": fused_low_memory,
    "fused, torch.compile": fused_compiled,
    "torch.compile, frozen": compiled_frozen,
    "torch.compile, reduce-overhead": compiled_mode("reduce-overhead"),
    "torch.compile, max-autotune": compiled_mode("max-autotune"),
    "CUDA graph": graphed(eager),
    "fused, CUDA graph": graphed(fused),
    "OpenVINO": openvino,
    "ONNX Runtime": onnx_runtime,
    "fused, int8 with its stem": functools.partial(in_eight_bits, stem="int8"),
    "fused, int8 throughout": functools.partial(in_eight_bits, stem="int8", classifier="int8"),
    "OpenVINO, int8": functools.partial(openvino, eight_bits=True),
    "ONNX Runtime, int8": functools.partial(onnx_runtime, eight_bits=True),
}
# Those that round to eight bits, and are held to another error.
IN_EIGHT_BITS = {name for name in ENGINES if "int8" in name} | {FLOAT8}
_ON_CPU = (
    "eager", "fused", "fused, low memory", "fused, torch.compile", "torch.compile",
    "torch.compile, frozen", "OpenVINO", "ONNX Runtime",
)  # fmt: skip
_ON_GPU = (
    "eager", "CUDA graph", "fused", "fused, low memory", "fused, CUDA graph",
    "fused, torch.compile", "torch.compile", "torch.compile, reduce-overhead",
    "torch.compile, max-autotune",
)  # fmt: skip
_EIGHT_BITS_ON_CPU = (
    "eager", "fused", INT8, "fused, int8 with its stem", "fused, int8 throughout",
    "OpenVINO, int8", "ONNX Runtime, int8",
)  # fmt: skip
_EIGHT_BITS_ON_GPU = ("eager", "fused", INT8)
_INFERENCE_ONLY = {
    "torch.compile, frozen", "OpenVINO", "ONNX Runtime", "CUDA graph", "fused, CUDA graph"
}  # fmt: skip

_TRAINING_ONLY = {"fused, low memory"}


def engines_for(
    device_type: str, train: bool, without: Collection[str] = (), eight_bits: bool = False
) -> dict[str, Engine]:
    """The candidates on a device, in the tables' order; "eager" cannot be left out."""
    names: tuple[str, ...]
    if eight_bits:
        names = _EIGHT_BITS_ON_GPU if device_type == "cuda" else _EIGHT_BITS_ON_CPU
    else:
        names = _ON_GPU if device_type == "cuda" else _ON_CPU
    elsewhere = _INFERENCE_ONLY if train else _TRAINING_ONLY
    left_out = {*without, *elsewhere} - {"eager"}
    return {name: ENGINES[name] for name in names if name not in left_out}


def settle_for(names: Collection[str]) -> float:
    """Seconds to sleep before each turn; see this module's docstring."""
    return SETTLE if any(name.startswith(("OpenVINO", "ONNX Runtime")) for name in names) else 0.0
