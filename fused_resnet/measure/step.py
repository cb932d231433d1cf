"""What is timed: one inference pass, or one training step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .case import Call, Case

# So small that thousands of timed steps leave the weights, and with them the work, as they were.
LEARNING_RATE = 1e-6
# Of a mixed-precision step's loss: no gradient of a first step overflows float16.
GRADIENT_SCALE = 1024.0


def _labels(logits: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(logits.shape[1], (logits.shape[0],), generator=generator)
    return labels.to(logits.device)


def step(
    owner: torch.nn.Module, forward: Callable[..., torch.Tensor], input: torch.Tensor, case: Case
) -> Call:
    """The timed call: an inference pass, or a training step on `owner`'s parameters."""
    if not case.train:
        inference = torch.inference_mode()(forward)
        return lambda: inference(input)

    optimizer = torch.optim.SGD(owner.parameters(), lr=LEARNING_RATE, momentum=0.9)
    device_type = case.torch_device.type
    mixed = {"dtype": case.torch_dtype} if case.is_mixed else {"enabled": False}
    scaled = case.is_mixed and case.torch_dtype is torch.float16
    scaler = torch.amp.GradScaler(device_type, GRADIENT_SCALE, enabled=scaled)
    labels: torch.Tensor | None = None

    def training_step() -> torch.Tensor:
        nonlocal labels
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device_type, **mixed):
            logits = forward(input)
        if labels is None:
            labels = _labels(logits, case.seed)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        scaler.scale(F.cross_entropy(wide, labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        return logits.detach()

    return training_step
