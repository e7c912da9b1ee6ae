"""What the numbers of a label image mean: one explicit rule, checked naming the file and the value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LabelFormat:
    """How a label image's values become classes: class = value − offset; ignored pixels keep `ignore`."""

    ignore: int = 255
    """The value of pixels that do not count, in files and afterwards."""
    offset: int = 0
    """Taken off every other value; what lies below it is ignored. 1 for ADE20K, whose 0 is no class."""

    def __post_init__(self):
        if self.ignore < 0 or self.offset < 0:
            raise ValueError(f"ignore and offset must be at least 0, got {self.ignore} and {self.offset}")

    def check(self, num_classes: int) -> None:
        """Raises ValueError if the ignored value is one of so many classes."""
        if self.ignore < num_classes:
            raise ValueError(f"ignore must be no class, got {self.ignore} for {num_classes} classes")

    def classes(self, values: np.ndarray, num_classes: int, name: str) -> Tensor:
        """Returns the classes (H, W) int64 of a label image, 0 to K − 1 or `ignore`; on the CPU.

        Args:
            values: Integers (H, W), as they are in the file: to be called once.
            num_classes: K.
            name: Of the file, for the message.

        Raises:
            ValueError: If a value is of no class, or the image has channels or fractions.
        """
        self.check(num_classes)
        if values.ndim != 2 or not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"labels must be integers (H, W), got {values.dtype} {values.shape} in {name}")
        found = torch.from_numpy(values.astype(np.int64))
        classes = found - self.offset
        uncounted = (found == self.ignore) | (classes < 0)
        wrong = ~uncounted & (classes >= num_classes)
        if wrong.any() or found.min() < 0:
            value = int(found.min()) if found.min() < 0 else int(found[wrong][0])
            first, last = self.offset, self.offset + num_classes - 1
            below = f", {', '.join(map(str, range(self.offset)))}" if self.offset else ""
            raise ValueError(
                f"labels must be {first} to {last}, or to be ignored {self.ignore}{below}, "
                f"got {value} in {name}"
            )
        return classes.masked_fill(uncounted, self.ignore)
