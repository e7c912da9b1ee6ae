"""Which input scores take: NumPy arrays or tensors of any float type, read as tensors and checked by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_tensor(values: Any, what: str) -> Tensor:
    """Returns an array or a tensor of any layout as a tensor, copied only where it must be.

    Args:
        values: NumPy array, tensor or nested list of floats; read-only and strided ones too.
        what: Its name in an error.

    Raises:
        ValueError: If it does not hold real floats.
    """
    if isinstance(values, Tensor):
        tensor = values.detach()
    else:
        array = np.asarray(values)
        if not np.issubdtype(array.dtype, np.floating):
            raise ValueError(f"{what} must be real floats, got {array.dtype}")
        if array.dtype.newbyteorder("=") not in (np.float16, np.float32, np.float64):
            array = array.astype(np.float64)
        # torch reads neither negative strides nor foreign byte order, and warns of what it may not write.
        tensor = torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    if not tensor.is_floating_point():
        raise ValueError(f"{what} must be real floats, got {tensor.dtype}")
    return tensor


def finite(values: Any, what: str) -> Tensor:
    """Returns the values as a tensor of their own float type; anything not finite is refused by name."""
    tensor = as_tensor(values, what)
    # The extremes are finite where everything is, and need no array of answers.
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        raise ValueError(f"{what} must be finite, got {int((~tensor.isfinite()).sum())} entries that are not")
    return tensor


def finite_double(values: Any, what: str) -> Tensor:
    """Returns the values as a float64 tensor; anything not finite is refused by name."""
    return finite(values, what).double()


def finite_pair(real: Any, fake: Any, what: str) -> tuple[Tensor, Tensor]:
    """Returns the features of both sets on one device, finite and of the same width.

    Args:
        real: Reference features (n, d), array or tensor.
        fake: Features (m, d) of the samples.
        what: The score that needs them, for errors.

    Raises:
        ValueError: If they are not (n, d) and (m, d) with one d ≥ 1, not floats or not finite.
    """
    real, fake = as_tensor(real, "real features"), as_tensor(fake, "fake features")
    shapes = tuple(real.shape), tuple(fake.shape)
    if real.ndim != 2 or fake.ndim != 2 or real.shape[1] != fake.shape[1] or not real.shape[1]:
        raise ValueError(f"{what}: features must be (n, d) and (m, d) with one d, got shapes {shapes}")
    return finite(real, "real features"), finite(fake, "fake features").to(real.device)
