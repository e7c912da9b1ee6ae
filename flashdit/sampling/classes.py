"""Which class each image shows: ids of names as people write them, and labels in equal or random shares."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor

from flashdit.shared.seeds import generator_for

ALL = "all"
NEAREST = 3


def class_ids(names: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """Returns the ids of classes given by id or by name.

    Args:
        names: Ids as text, or names; capitals do not matter, and one of a class's names that commas part will
            do. `all` alone stands for every class.
        class_names: The model's, one per class.

    Raises:
        ValueError: If an id is out of range, or a name unknown or that of several classes.
    """
    if list(names) == [ALL]:
        return list(range(len(class_names)))
    known: dict[str, list[int]] = {}
    for i, name in enumerate(class_names):
        for word in {name.strip().lower(), *(part.strip().lower() for part in name.split(","))}:
            known.setdefault(word, []).append(i)
    return [_class_id(name, class_names, known) for name in names]


def _class_id(name: str, class_names: Sequence[str], known: dict[str, list[int]]) -> int:
    """Returns the id of one class."""
    exact = [i for i, other in enumerate(class_names) if other == name]
    ids = exact or known.get(name.strip().lower(), [])
    if len(ids) > 1:
        raise ValueError(
            f"class '{name}' must name one class, got {' and '.join(map(str, ids))}: give the id"
        )
    if ids:
        return ids[0]
    count = len(class_names)
    if not name.lstrip("-").isdecimal():
        nearest = difflib.get_close_matches(name.lower(), known, n=NEAREST)
        hint = f"; did you mean {' or '.join(repr(word) for word in nearest)}?" if nearest else ""
        raise ValueError(f"unknown class '{name}'{hint} (this model has {count} classes)")
    if not count:
        raise ValueError(f"this model has no classes, got class {name}")
    if not 0 <= int(name) < count:
        raise ValueError(f"class {name} is out of range for this {count}-class model (0–{count - 1})")
    return int(name)


def balanced_labels(num_images: int, num_classes: int, seed: int) -> Tensor:
    """Returns labels (num_images,) int64, each class as often as any other (± 1), in seeded random order."""
    order = torch.randperm(num_images, generator=generator_for(seed, "labels", 0))
    return (torch.arange(num_images) % max(1, num_classes))[order]


def equal_shares(num_images: int, ids: Sequence[int]) -> Tensor:
    """Returns labels (num_images,) int64: these classes in equal shares (± 1), one after another."""
    return torch.tensor(ids)[torch.arange(num_images) * len(ids) // num_images]


def random_labels(num_images: int, ids: Sequence[int], seed: int) -> Tensor:
    """Returns labels (num_images,) int64, drawn from these classes: label i by (seed, i) alone."""
    draws = [
        torch.randint(len(ids), (), generator=generator_for(seed, "label", i)) for i in range(num_images)
    ]
    return torch.tensor(ids)[torch.stack(draws)]
