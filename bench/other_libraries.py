"""Counts and times the networks of other libraries, fused and unfused; writes other_libraries.json.

    OMP_NUM_THREADS=1 python bench/other_libraries.py [NAME...]

Of each network whose library is installed: how many of its convolutions with a norm behind them are
fused, and the time of an inference pass unfused and fused, in float32 and channels_last, on one
thread. The weights are random. `docs/make_support_matrix.py` makes a table of it.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fused_resnet
from fused_resnet import forms
from fused_resnet.measure import environment
from fused_resnet.testing import randomize_

WRITTEN = Path(__file__).with_suffix(".json")
SIZE = 224
ROUNDS, SECONDS = 5, 0.6


def _of(module: str, name: str, *arguments: Any, **keywords: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(importlib.import_module(module), name)(*arguments, **keywords)


def _transformers(model: str, config: str, **keywords: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        transformers: Any = importlib.import_module("transformers")
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**keywords))
        return made

    return make


def _extractor() -> nn.Module:
    models: Any = importlib.import_module("torchvision.models")
    extraction: Any = importlib.import_module("torchvision.models.feature_extraction")
    made: nn.Module = extraction.create_feature_extractor(models.resnet50(), ["layer4"])
    return made


def _detr() -> nn.Module:
    frozen: Any = importlib.import_module("transformers.models.detr.modeling_detr")
    models: Any = importlib.import_module("torchvision.models")
    made: nn.Module = models.resnet50(norm_layer=frozen.DetrFrozenBatchNorm2d)
    return made


def _detr_whole(kind: str) -> Callable[[], nn.Module]:
    """The backbone inside a whole model, whose norms transformers replaces and marks."""

    def make() -> nn.Module:
        transformers: Any = importlib.import_module("transformers")
        config = getattr(transformers, f"{kind}Config")(
            use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
            backbone_config=transformers.ResNetConfig(out_features=["stage4"]),
        )  # fmt: skip
        model: Any = getattr(transformers, f"{kind}Model")(config)
        backbone = model.backbone
        made: nn.Module = getattr(backbone, "conv_encoder", backbone).model
        return made

    return make


def _pretrainedmodels() -> nn.Module:
    models: Any = importlib.import_module("pretrainedmodels")
    made: nn.Module = models.se_resnet50(pretrained=None)
    return made


def _lightly() -> nn.Module:
    models: Any = importlib.import_module("lightly.models")
    made: nn.Module = models.ResNetGenerator("resnet-50")
    return nn.Sequential(*list(made.children())[:-1])


_VISION, _TIMM, _MONAI = "torchvision.models", "timm", "monai.networks.nets"
NETWORKS: dict[tuple[str, str], Callable[[], nn.Module]] = {
    ("torchvision", "regnet_y_3_2gf"): _of(_VISION, "regnet_y_3_2gf"),
    ("torchvision", "regnet_x_3_2gf"): _of(_VISION, "regnet_x_3_2gf"),
    ("torchvision", "googlenet"): _of(_VISION, "googlenet", init_weights=False),
    ("torchvision", "inception_v3"): _of(_VISION, "inception_v3", init_weights=False),
    ("torchvision", "mobilenet_v2"): _of(_VISION, "mobilenet_v2"),
    ("torchvision", "quantization.resnet50"): _of(f"{_VISION}.quantization", "resnet50"),
    ("torchvision", "create_feature_extractor(resnet50)"): _extractor,
    ("transformers", "ResNet-50"): _transformers("ResNetModel", "ResNetConfig"),
    ("transformers", "ResNet-50 v1"): _transformers(
        "ResNetModel", "ResNetConfig", downsample_in_bottleneck=True
    ),
    ("transformers", "RegNet"): _transformers("RegNetModel", "RegNetConfig"),
    ("transformers", "RT-DETR's ResNet-50"): _transformers(
        "RTDetrResNetBackbone", "RTDetrResNetConfig"
    ),
    ("transformers", "resnet50 with DETR's norm"): _detr,
    ("transformers", "DETR's ResNet-50, whole"): _detr_whole("Detr"),
    ("transformers", "Table Transformer's"): _detr_whole("TableTransformer"),
    ("pytorchcv", "resnet50"): _of("pytorchcv.model_provider", "get_model", "resnet50"),
    ("pytorchcv", "seresnet50"): _of("pytorchcv.model_provider", "get_model", "seresnet50"),
    ("lightly", "resnet-50"): _lightly,
    ("pretrainedmodels", "se_resnet50"): _pretrainedmodels,
    ("torchvision", "mobilenet_v3_large"): _of(_VISION, "mobilenet_v3_large"),
    ("monai", "DenseNet121"): _of(
        _MONAI, "DenseNet121", spatial_dims=2, in_channels=3, out_channels=10
    ),
    ("open_clip", "RN50"): _of(
        "open_clip.modified_resnet", "ModifiedResNet", (3, 4, 6, 3), 1024, 32, image_size=SIZE
    ),
    ("monai", "resnet50"): _of(
        _MONAI, "resnet50", spatial_dims=2, n_input_channels=3, num_classes=10
    ),
    ("monai", "SEResNet50"): _of(
        _MONAI, "SEResNet50", spatial_dims=2, in_channels=3, num_classes=10
    ),
    ("fastai", "xresnet50"): _of("fastai.vision.models.xresnet", "xresnet50"),
    ("segmentation_models_pytorch", "Unet, resnet34"): _of(
        "segmentation_models_pytorch", "Unet", "resnet34", encoder_weights=None
    ),
    **{
        ("timm", name): _of(_TIMM, "create_model", name)
        for name in (
            *("regnety_032", "gernet_m", "cspresnet50", "resnest50d", "res2net50_26w_4s"),
            *("skresnet34", "dla60", "densenet121", "resnetv2_50"),
        )
    },
    ("timm", "resnet50, features_only"): _of(_TIMM, "create_model", "resnet50", features_only=True),
}


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="networks; all without any")
    wanted = parser.parse_args().names
    torch.set_num_threads(1)
    rows = _kept()
    for (library, name), make in NETWORKS.items():
        if wanted and name not in wanted:
            continue
        try:
            importlib.import_module(library)
        except ImportError:
            continue
        row = measured(make)
        rows[f"{library} {name}"] = {"library": library, "model": name, **row}
        print(library, name, row, flush=True)
    document = {
        "processor": environment.describe_device(torch.device("cpu"))["name"],
        "torch": torch.__version__,
        "commit": environment.commit(),
        "date": datetime.date.today().isoformat(),
        "size": SIZE,
        "networks": [*rows.values()],
    }
    WRITTEN.write_text(json.dumps(document, indent=1) + "\n")


def _kept() -> dict[str, dict[str, Any]]:
    """What was measured before."""
    if not WRITTEN.exists():
        return {}
    networks = json.loads(WRITTEN.read_text())["networks"]
    return {f"{row['library']} {row['model']}": row for row in networks}


def measured(make: Callable[[], nn.Module]) -> dict[str, Any]:
    """A network's counts and times."""
    torch.manual_seed(0)
    eager = randomize_(make()).eval().to(memory_format=torch.channels_last)
    # A copy of one of torchvision's feature extractors is in training mode again.
    fused = fused_resnet.fuse(copy.deepcopy(eager).eval())
    x = torch.randn(1, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        before, after = _times(eager, fused, x)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in eager.modules())
    return {
        "convolutions": convolutions,
        "fused": len(fused_convolutions(fused)),
        "eager_ms": round(before * 1e3, 1),
        "fused_ms": round(after * 1e3, 1),
    }


def fused_convolutions(model: nn.Module) -> set[nn.Module]:
    """The convolutions that run with the norm behind them, by the model's records."""
    found: set[nn.Module] = set()
    modules = dict(model.named_modules())
    for record in fused_resnet.report(model):
        module = modules[record.path]
        form = forms.of_fused(type(module))
        if not record.fused or form is None:
            continue
        for unit in form.units_of(module):
            found.add(module.get_submodule(unit.conv))
        shortcut = getattr(module, form.shortcut) if form.shortcut else None
        if shortcut is not None:
            found.update(m for m in shortcut.modules() if isinstance(m, nn.Conv2d))
    return found


def _times(eager: nn.Module, fused: nn.Module, x: torch.Tensor) -> tuple[float, float]:
    """Seconds of a pass of each on its thread: medians of rounds that take turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for model in (eager, fused, fused):
        model(x)
    for _ in range(ROUNDS):
        for model, taken in zip((eager, fused), times, strict=True):
            # The thread's own, which other processes take nothing of but caches.
            start, passes = time.thread_time(), 0
            while time.thread_time() - start < SECONDS / ROUNDS or not passes:
                model(x)
                passes += 1
            taken.append((time.thread_time() - start) / passes)
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    main()
