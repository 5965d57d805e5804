"""Mixed precision that can be trusted: bfloat16, but for convolutions that this processor library gets wrong in it.

oneDNN 3.12 (in PyTorch 2.13) leaves parts of a weight's gradient unwritten where an image is narrower than the
kernel along some axis, as in the lowest level of a U-Net; these convolutions, the cheapest ones, stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = (
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
)


def mixed(device_type: str) -> AbstractContextManager[Any]:
    """Return a context in which a forward pass on a device computes in bfloat16 where that is safe."""
    contexts = ExitStack()
    contexts.enter_context(torch.autocast(device_type, torch.bfloat16))
    if device_type == "cpu":
        contexts.enter_context(_NarrowInFloat32())
    return contexts


class _NarrowInFloat32(TorchFunctionMode):
    """Convolve images that are narrower than the kernel outside of autocast."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in CONVOLUTIONS or not _narrow(*args[:2]):
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            return func(*map(_in_float32, args), **{name: _in_float32(value) for name, value in (kwargs or {}).items()})


def _narrow(images: Tensor, kernel: Tensor, *_others: Any) -> bool:
    """Tell whether images [N, C, *S] are narrower than a kernel [C, D, *K] along some axis."""
    return any(size < width for size, width in zip(images.shape[2:], kernel.shape[2:], strict=True))


def _in_float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
