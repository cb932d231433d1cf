"""Models and images for the comparison: models by name, images by path."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import PIL.Image
import torch
import torchvision

from ..testing import randomize_
from . import sources
from .errors import InvalidArgumentError, first_line

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MOST_CALIBRATION = 128
CALIBRATION_CROPS = 16

# How many times as long as wide an image may be.
_LONGEST = 100


def known_models() -> list[str]:
    """Names of the models in torchvision whose residual blocks this package replaces."""
    include = ["resnet*", "resnext*", "wide_resnet*"]
    return torchvision.models.list_models(module=torchvision.models, include=include)


def build_model(name: str, weights: str | None, seed: int) -> torch.nn.Module:
    """A model in float32 on the CPU.

    Args:
        name: one of `known_models()`, or see `sources.py`.
        weights: None for seeded random parameters and batch-norm statistics; the name of one of
            torchvision's weights for the model (`IMAGENET1K_V2`, downloaded unless cached); or
            the path of a file that holds a state_dict, bare or under "state_dict" or "model".
            Of models from elsewhere, None.
        seed: of the random parameters.

    Raises:
        InvalidArgumentError: unknown model, or weights that cannot be had, read, or loaded
            strictly.
    """
    if sources.is_elsewhere(name):
        if weights is not None:
            raise InvalidArgumentError(
                f"--weights is {weights!r}, which is for torchvision's models; to load {name}'s, "
                "write a function that does and name it as module:function"
            )
        return sources.build(name, seed)
    if name not in known_models():
        known = ", ".join(known_models())
        raise InvalidArgumentError(
            f"MODEL is {name!r}, must be one of {known}, or timm:NAME, hf:NAME or module:function"
        )
    if weights is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = torchvision.models.get_model(name)
        return randomize_(model, seed)
    if Path(weights).is_file():
        return _model_from_file(name, Path(weights))
    entries = torchvision.models.get_model_weights(name).__members__
    if weights not in entries:
        known = ", ".join([*entries, "the path of a checkpoint"])
        raise InvalidArgumentError(f"--weights is {weights!r}, for {name} must be one of {known}")
    try:
        return torchvision.models.get_model(name, weights=entries[weights])
    except OSError as error:  # URLError among them
        raise InvalidArgumentError(
            f"--weights is {weights!r}, which could not be downloaded: {first_line(error)}"
        ) from None


def _model_from_file(name: str, path: Path) -> torch.nn.Module:
    what = f"--weights is {str(path)!r}"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # of damaged files, nearly anything
        raise InvalidArgumentError(
            f"{what}, which torch.load cannot read: {first_line(error)}"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    last = state.get("fc.weight") if isinstance(state, dict) else None
    if not isinstance(last, torch.Tensor):
        raise InvalidArgumentError(f"{what}, which holds no state_dict of {name} (no 'fc.weight')")
    for key in state:
        if not isinstance(key, str):
            raise InvalidArgumentError(
                f"{what}, whose state_dict has the key {key!r}, must have text alone"
            )
    with torch.device("meta"):
        features = torchvision.models.get_model(name).fc.in_features
    # The model is as large as it says, so it is to say nothing that the file does not hold.
    stored = 0 if last.layout is not torch.strided else last.untyped_storage().nbytes()
    if last.is_meta or last.numel() * last.element_size() > stored:
        raise InvalidArgumentError(
            f"{what}, whose fc.weight of shape {tuple(last.shape)} is not all in the file"
        )
    if last.dim() != 2 or last.shape[0] < 1 or last.shape[1] != features:
        raise InvalidArgumentError(
            f"{what}, MODEL is {name!r}: fc.weight has shape {tuple(last.shape)}, "
            f"must be (classes, {features})"
        )
    model = torchvision.models.get_model(name, num_classes=last.shape[0])
    try:
        model.load_state_dict(state)
    except MemoryError:
        raise
    except Exception as error:  # of what is no tensor, nearly anything
        reason = " ".join(str(error).split())[:200]
        raise InvalidArgumentError(f"{what}, MODEL is {name!r}: {reason}") from None
    return model


def sample_photograph() -> Path:
    """The portrait of Grace Hopper that ships with matplotlib.

    Raises:
        InvalidArgumentError: matplotlib, or its sample data, is not installed.
    """
    spec = importlib.util.find_spec("matplotlib")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"
        if path.is_file():
            return path
    raise InvalidArgumentError(
        "--image is not given and the default photograph is missing: pip install matplotlib"
    )


def load_image(path: str | os.PathLike[str], argument: str = "--image") -> PIL.Image.Image:
    """Reads an RGB image; `argument` is what messages say it was given as.

    Raises:
        InvalidArgumentError: there is no such file, Pillow cannot read it as an image, or it has
            more pixels than Pillow takes for safe, or is over 100 times as long as wide.
    """
    path = os.fspath(path)
    if not os.path.exists(path):
        raise InvalidArgumentError(f"{argument} is {path!r}, which does not exist")
    if os.path.isdir(path):
        raise InvalidArgumentError(
            f"{argument} is {path!r}, which is a directory, must be an image file"
        )
    try:
        # Pillow warns of images of over 89 million pixels and refuses those of twice as many.
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
            image = stack.enter_context(PIL.Image.open(path))
            width, height = image.size
            if max(width, height) > _LONGEST * min(width, height):
                # The shorter side becomes as long as the crop's, the longer one in proportion.
                raise ValueError(
                    f"{width}x{height} pixels, must be at most {_LONGEST} times as long as wide"
                )
            return image.convert("RGB")
    except MemoryError:
        raise
    except PIL.UnidentifiedImageError:
        reason = "not an image that Pillow can read"
    except Exception as error:  # from inside Pillow's decoders, nearly anything
        reason = f"not readable: {first_line(error)}"
    raise InvalidArgumentError(f"{argument} is {path!r}, which is {reason}")


def _preset_of(model: str) -> tuple[Callable[[PIL.Image.Image], torch.Tensor], int]:
    """What makes of a photograph what a model reads, and the rows and columns of that."""
    if sources.is_elsewhere(model):
        source = sources.source_of(model)
        return source.preset, source.size
    preset = torchvision.models.get_model_weights(model).DEFAULT.transforms()
    return preset, preset.crop_size[0]


def build_input(model: str, images: Sequence[str], batch: int, seed: int) -> torch.Tensor:
    """A batch of photographs as the model's, or ImageNet's, weights expect them.

    Each image goes through torchvision's transforms (resize, centre crop, normalise). Where the
    batch is larger than the list, the images come again as random crops, so that no two inputs
    are the same.

    Returns:
        float32, (batch, 3, size, size), 224 of torchvision's models.
    """
    preset, size = _preset_of(model)
    paths: Sequence[str | os.PathLike[str]] = images or [sample_photograph()]
    loaded = [load_image(path) for path in paths]
    tensors = [preset(image) for image in loaded[:batch]]
    generator = torch.Generator().manual_seed(seed)
    while len(tensors) < batch:
        image = loaded[len(tensors) % len(loaded)]
        scale, left, top = torch.rand(3, generator=generator).tolist()
        side = (0.4 + 0.5 * scale) * min(image.size)
        x, y = left * (image.width - side), top * (image.height - side)
        crop = image.resize((size, size), PIL.Image.Resampling.BILINEAR, (x, y, x + side, y + side))
        tensors.append(preset(crop))
    return torch.stack(tensors)


def calibration_images(
    model: str, folder: str | None, images: Sequence[str], seed: int
) -> torch.Tensor:
    """Photographs to calibrate a quantized model on, as `build_input` makes them.

    Args:
        model: as of `build_model`.
        folder: where they are, folders inside included; of more than `MOST_CALIBRATION` every so
            many-th is taken. None for `CALIBRATION_CROPS` crops of `images`.
        images: see `build_input`.
        seed: of these crops, which are others than the input's of the same seed.

    Returns:
        float32, (N, 3, size, size).

    Raises:
        InvalidArgumentError: there is no such folder, or no image in it, or one that cannot be
            read.
    """
    if folder is None:
        # The first entries are the whole images, in the input too.
        count = max(1, len(images))
        return build_input(model, images, count + CALIBRATION_CROPS, seed + 1)[count:]
    if not os.path.isdir(folder):
        raise InvalidArgumentError(f"--calibrate is {folder!r}, which is not a folder")
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise InvalidArgumentError(
            f"--calibrate is {folder!r}, which has no image ({', '.join(IMAGE_SUFFIXES)})"
        )
    step = -(-len(paths) // MOST_CALIBRATION)
    preset, _ = _preset_of(model)
    return torch.stack([preset(load_image(path, "--calibrate")) for path in paths[::step]])
