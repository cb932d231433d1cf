"""Where `compare` has a model from, by what its name begins with.

    resnet50                        torchvision
    timm:resnet26d                  timm, if it is installed
    hf:resnet-50, hf:RegNetConfig   transformers, if it is installed: a size or a configuration
    package.module:function         yours: a function that returns a model

Nothing is downloaded: models of the last three have random weights, or those that the function
gives them.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import PIL.Image
import torch
from torch import Tensor, nn
from torchvision.transforms._presets import ImageClassification

from ..testing import randomize_
from .errors import InvalidArgumentError, first_line

_Preset = Callable[[PIL.Image.Image], Tensor]


class Source(NamedTuple):
    """A model by its name.

    Attributes:
        make: makes it, in float32 on the CPU, with the random weights of torch's generator.
        preset: makes of a photograph what it reads, (3, size, size).
        size: rows and columns of that.
        is_random: whether batch-norm statistics are to be random too.
    """

    make: Callable[[], nn.Module]
    preset: _Preset
    size: int
    is_random: bool


def source_of(name: str) -> Source:
    """The source of a model that torchvision does not have.

    Raises:
        InvalidArgumentError: there is no such model, or what it is from is not installed.
    """
    prefix, _, rest = name.partition(":")
    if prefix == "timm":
        return _timm(name, rest)
    if prefix == "hf":
        return _transformers(name, rest)
    return _function(name, prefix, rest)


def is_elsewhere(name: str) -> bool:
    """Whether a name is of a model that torchvision does not have."""
    return ":" in name


def build(name: str, seed: int) -> nn.Module:
    """The model, the same for the same seed.

    Raises:
        InvalidArgumentError: see `source_of`; or it cannot be made.
    """
    source = source_of(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = source.make()
    return randomize_(model, seed) if source.is_random else model


def _needed(name: str, package: str) -> Any:
    if importlib.util.find_spec(package) is None:
        raise InvalidArgumentError(
            f"MODEL is {name!r}, which needs {package}: pip install {package}"
        )
    return importlib.import_module(package)


def _unknown(name: str, package: str, known: Sequence[str], wanted: str) -> InvalidArgumentError:
    near = difflib.get_close_matches(wanted, known, 3, 0.5)
    hint = f"; near it are {', '.join(near)}" if near else ""
    return InvalidArgumentError(f"MODEL is {name!r}, which {package} does not have{hint}")


def _timm(name: str, wanted: str) -> Source:
    timm = _needed(name, "timm")
    if not timm.is_model(wanted):
        raise _unknown(name, "timm", timm.list_models(), wanted)
    config = timm.get_pretrained_cfg(wanted).to_dict()
    size = config["input_size"][-1]
    preset = ImageClassification(
        crop_size=size,
        resize_size=round(size / config["crop_pct"]),
        mean=config["mean"],
        std=config["std"],
    )
    return Source(lambda: timm.create_model(wanted, pretrained=False), preset, size, True)


# depths, hidden_sizes and layer_type of transformers' ResNetConfig.
_NARROW, _WIDE = [64, 128, 256, 512], [256, 512, 1024, 2048]
_RESNETS = {
    "resnet-18": ([2, 2, 2, 2], _NARROW, "basic"),
    "resnet-26": ([2, 2, 2, 2], _WIDE, "bottleneck"),
    "resnet-34": ([3, 4, 6, 3], _NARROW, "basic"),
    "resnet-50": ([3, 4, 6, 3], _WIDE, "bottleneck"),
    "resnet-101": ([3, 4, 23, 3], _WIDE, "bottleneck"),
    "resnet-152": ([3, 8, 36, 3], _WIDE, "bottleneck"),
}


def _transformers(name: str, wanted: str) -> Source:
    transformers = _needed(name, "transformers")
    if wanted in _RESNETS:
        depths, sizes, layer = _RESNETS[wanted]
        config = transformers.ResNetConfig(
            depths=depths, hidden_sizes=sizes, layer_type=layer, num_labels=1000
        )
    elif wanted.endswith("Config") and hasattr(transformers, wanted):
        config = getattr(transformers, wanted)(num_labels=1000)
    else:
        known = [*_RESNETS, *(one for one in dir(transformers) if one.endswith("Config"))]
        raise _unknown(name, "transformers", known, wanted)

    def make() -> nn.Module:
        try:
            model = transformers.AutoModelForImageClassification.from_config(config)
        except (ValueError, TypeError) as error:
            raise InvalidArgumentError(
                f"MODEL is {name!r}, which classifies no images: {first_line(error)}"
            ) from None
        return Logits(model)

    return Source(make, ImageClassification(crop_size=224), 224, True)


@contextlib.contextmanager
def _current_folder_on_path() -> Iterator[None]:
    """Modules beside which a command runs can be imported, as `python -m` does."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _function(name: str, module: str, function: str) -> Source:
    what = f"MODEL is {name!r}"

    def make() -> nn.Module:
        with _current_folder_on_path():
            try:
                found = getattr(importlib.import_module(module), function, None)
            except Exception as error:
                reason = f"{type(error).__name__}: {first_line(error)}"
                raise InvalidArgumentError(
                    f"{what}, but importing {module} fails: {reason}"
                ) from None
            if not callable(found):
                raise InvalidArgumentError(
                    f"{what}, but {module} has no function {function!r}: name one that returns a "
                    "model, as module:function"
                )
            try:
                model = found()
            except Exception as error:
                reason = f"{type(error).__name__}: {first_line(error)}"
                raise InvalidArgumentError(
                    f"{what}, but calling it without arguments fails: {reason}"
                ) from None
        if not isinstance(model, nn.Module):
            raise InvalidArgumentError(
                f"{what}, which returns a {type(model).__name__}, must return a torch.nn.Module"
            )
        return Logits(model.float().cpu())

    if not module or not function:
        raise InvalidArgumentError(f"{what}, must be module:function")
    return Source(make, ImageClassification(crop_size=224), 224, False)


class Logits(nn.Module):
    """A model whose output is one row an image, from what its class returns.

    Args:
        model: returns a tensor or, as transformers' do, an object with `logits`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        out = self.model(x)
        out = getattr(out, "logits", out)
        if not isinstance(out, Tensor) or out.dim() < 2:
            raise InvalidArgumentError(
                f"MODEL returns a {type(out).__name__}, must return a tensor (N, ...) or an object "
                "with one as logits"
            )
        return out.flatten(1)
