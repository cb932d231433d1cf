"""A comparison of whole models as data: the case, and what was found of each candidate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch

from .. import backends
from ..layers.quantized import EIGHT_BITS
from .clock import Latency
from .errors import InvalidArgumentError

DTYPES = ("float32", "bfloat16", "float16")
# `FACTOR` times eager's error is what this library promises. Of somebody else's engine we only ask
# that it computes the same thing at the precision it was told to.
FACTOR_OF_OTHERS = 10.0
# Of eight bits: the error relative to float64 from which on it is not the same network any more.
LARGEST_INT8_ERROR = 0.25
# How long a candidate runs for its energy to be read.
ENERGY_SECONDS = 1.0

Call = Callable[[], torch.Tensor]
Engine = Callable[[torch.nn.Module, torch.Tensor, "Case"], Call]
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compared, on which input, and how it is measured.

    Attributes:
        model: name of a torchvision residual network, or of another's: see `sources.py`.
        batch: images in the input; None for as many as `images` has, or one.
        dtype: "float32", "bfloat16" or "float16", of parameters, buffers and input alike. Training
            in 16 bits is what people call mixed precision: float32 parameters and input, the
            forward pass under `torch.autocast`, and for float16 a `GradScaler`.
        device: "cpu", "cuda" or "cuda:N".
        images: paths of the user's images; the photograph that ships with matplotlib when empty.
        backend: the fused model's backend; None for the library's own choice.
        train: time a training step (forward, backward, SGD) in place of an inference pass.
        compile: also run the eager model under `torch.compile`.
        threads: torch's CPU threads; None for torch's default.
        rounds: how often each candidate is timed.
        weights: see `inputs.build_model`.
        seed: of weights, labels and crops.
        memory: measure the peak memory as well.
        quantize: also run the fused model in eight bits, in "int8" or "float8_e4m3fn"; or None.
        calibrate: folder of images to find its ranges on; None for crops of the input's.
    """

    model: str
    batch: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    images: tuple[str, ...] = ()
    backend: str | None = None
    train: bool = False
    compile: bool = False
    threads: int | None = None
    rounds: int = 30
    weights: str | None = None
    seed: int = 0
    memory: bool = True
    quantize: str | None = None
    calibrate: str | None = None

    def check(self) -> None:
        """Raises InvalidArgumentError for the first argument that cannot be used."""
        if self.dtype not in DTYPES:
            raise InvalidArgumentError(
                f"--dtype is {self.dtype!r}, must be one of {', '.join(DTYPES)}"
            )
        for name in ("batch", "rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgumentError(f"--{name} is {value}, must be at least 1")
        if len(self.images) > self.batch_size:
            raise InvalidArgumentError(
                f"--batch is {self.batch}, must be at least the {len(self.images)} images given"
            )
        if self.quantize is not None and self.quantize not in EIGHT_BITS:
            raise InvalidArgumentError(
                f"--quantize-dtype is {self.quantize!r}, must be one of {', '.join(EIGHT_BITS)}"
            )
        if self.quantize and self.train:
            raise InvalidArgumentError("--quantize is for inference, must not be with --train")
        if self.calibrate is not None and not self.quantize:
            raise InvalidArgumentError(f"--calibrate is {self.calibrate!r}, which needs --quantize")
        check_device(self.device)
        self._check_backend()

    def _check_backend(self) -> None:
        try:
            backends.check_environment()
        except ValueError as error:
            raise InvalidArgumentError(str(error)) from None
        if self.backend is None:
            return
        available = backends.available()
        if self.backend not in available:
            known = ", ".join(available)
            raise InvalidArgumentError(f"--backend is {self.backend!r}, must be one of {known}")
        if available[self.backend] != "yes":
            reason = available[self.backend]
            raise InvalidArgumentError(f"--backend is {self.backend!r}, which cannot run: {reason}")

    @property
    def batch_size(self) -> int:
        """Images in the input."""
        return self.batch if self.batch is not None else max(1, len(self.images))

    @property
    def torch_device(self) -> torch.device:
        """The device of model and input."""
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in which convolutions compute."""
        return getattr(torch, self.dtype)

    @property
    def precision(self) -> str:
        """What result files call its dtype: that of eight bits, where they are compared."""
        return self.quantize or self.dtype

    @property
    def is_mixed(self) -> bool:
        """Whether the case trains in 16 bits, which leaves model and input in float32."""
        return self.train and self.dtype != "float32"


def check_device(device: str) -> None:
    """Raises InvalidArgumentError if torch has no such device here."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise InvalidArgumentError(f"--device is {device!r}, must be cpu, cuda or cuda:N")
    if kind == "cuda":
        if not torch.cuda.is_available():
            why = "is built without CUDA" if torch.version.cuda is None else "finds no GPU"
            raise InvalidArgumentError(
                f"--device is {device!r}, but torch {torch.__version__} {why}"
            )
        if index and int(index) >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise InvalidArgumentError(f"--device is {device!r}, but torch finds {count} GPU(s)")


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A candidate's first result against float64's.

    Attributes:
        error: norm of the logits' difference over the norm of float64's logits.
        gradient_error: the same of all parameters' gradients as one vector; None in inference.
        top5: share of float64's five highest classes that are among the candidate's, mean over
            the batch.
    """

    error: float
    gradient_error: float | None
    top5: float


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One row of the table.

    All fields are None when it was `skipped`, for the reason it holds. A candidate that is `wrong`
    has an accuracy and nothing else: it was not timed.
    """

    name: str
    skipped: str | None = None
    latency: Latency | None = None
    accuracy: Accuracy | None = None
    peak_memory: int | None = None
    kept: int | None = None
    energy: float | None = None
    ratio_to_eager: float | None = None
    wrong: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """What `compare` found: the case, its candidates, eager first, and what was fused.

    `quantized` is what is to be said of eight bits, a line each.
    """

    case: Case
    threads: int
    candidates: tuple[Candidate, ...]
    fused: tuple[str, ...]
    interrupted: bool
    telemetry: Mapping[str, Mapping[str, float | None]]
    quantized: tuple[str, ...] = ()

    def images_per_second(self, candidate: Candidate) -> float:
        """Throughput at the candidate's median latency."""
        if candidate.latency is None:
            raise ValueError(f"images_per_second: {candidate.name} was not timed")
        return 1e3 * self.case.batch_size / candidate.latency.median
