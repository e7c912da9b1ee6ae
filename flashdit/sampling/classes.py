"""Which class each image shows: ids of names as people write them, and labels in equal or random shares."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashdit.sampling.imagenet import imagenet_classes
from flashdit.shared.process import check_memory
from flashdit.shared.registry import counted, unknown
from flashdit.shared.seeds import generator_for

ALL = "all"
NEAREST = 3
CLASSES_NAMED = 20  # classes, all of which a message names
LABEL_BYTES = 200.0
"""Of memory that a label takes while labels are made, listed and hashed, at the least."""
ORDERS = ("balanced", "random")
PER_CLASS, FIRST_CLASSES = 10, 10
"""Images of each class, and classes, where nothing else is asked for."""


def flattened(labels: Any) -> list[int | str]:
    """Returns labels given as one, or in tensors, arrays or sequences of any depth, one after another."""
    if isinstance(labels, (Tensor, np.ndarray)):
        labels = labels.tolist()
    if isinstance(labels, str) or not isinstance(labels, Sequence):
        return [labels]
    return [label for item in labels for label in flattened(item)]


def class_ids(names: Sequence[str | int], class_names: Sequence[str]) -> list[int]:
    """Returns the ids of classes given by id or by name.

    Args:
        names: Ids as numbers or text, or names; capitals do not matter, and of several names with commas
            between them one is enough. `all` alone stands for every class. ImageNet's classes go by WordNet
            id and by words too.
        class_names: The model's, one per class.

    Raises:
        ValueError: If an id is out of range, or a name unknown or that of several classes.
    """
    if list(names) == [ALL]:
        return list(range(len(class_names)))
    known: dict[str, list[int]] = {}
    imagenet = imagenet_classes(class_names)
    for i, name in enumerate(class_names):
        texts = [name, *imagenet.get(i, ())]
        for word in {part.strip().lower() for text in texts for part in (text, *text.split(","))}:
            known.setdefault(word, []).append(i)
    return [_class_id(name, class_names, known) for name in names]


def _class_id(name: str | int, class_names: Sequence[str], known: dict[str, list[int]]) -> int:
    """Returns the id of one class."""
    count = len(class_names)
    if not isinstance(name, str):  # 0 is the null label of a model without classes
        return _checked(name, max(1, count))
    exact = [i for i, other in enumerate(class_names) if other == name]
    ids = exact or known.get(name.strip().lower(), [])
    if len(ids) > 1:
        raise ValueError(
            f"class '{name}' must name one class, got {' and '.join(map(str, ids))}: give the id"
        )
    if ids:
        return ids[0]
    if not name.lstrip("-").isdecimal():
        nearest = difflib.get_close_matches(name.lower(), known, n=NEAREST)
        hint = f"; did you mean {' or '.join(repr(word) for word in nearest)}?" if nearest else ""
        every = f": {', '.join(class_names)}" if count <= CLASSES_NAMED else ""
        raise ValueError(
            f"unknown class '{name}'{hint} (this model has {counted(count, 'class', 'classes')}{every})"
        )
    if not count:
        raise ValueError(f"this model has no classes, got class {name}")
    return _checked(int(name), count)


def _checked(number: int, count: int) -> int:
    """Returns the id of a class, or raises ValueError unless it is a whole number from 0 to below count."""
    if not (isinstance(number, Integral) and 0 <= number < count):
        raise ValueError(f"class {number} is out of range for this {count}-class model (0–{count - 1})")
    return int(number)


def choose_labels(
    class_names: Sequence[str],
    classes: Sequence[str | int] | None,
    num_images: int | None,
    order: str = "balanced",
    seed: int = 0,
) -> Tensor:
    """Returns the label of each image (N,) int64.

    Args:
        class_names: The model's, one per class.
        classes: As `class_ids` takes them; none are all classes, the first ten where `num_images` is None.
        num_images: In all, shared among the classes; None makes ten of each.
        order: `balanced`, in equal shares and in the order of the classes, or `random`.
        seed: Of the random order.

    Raises:
        ValueError: If a class, the number or the order is invalid.
    """
    if order not in ORDERS:
        raise unknown("labels", order, ORDERS)
    count = len(class_names)
    every = range(count if num_images else min(FIRST_CLASSES, count))
    ids = class_ids(classes, class_names) if classes else list(every)
    ids = ids or [0]  # the null label of a model without classes
    total = PER_CLASS * len(ids) if num_images is None else num_images
    if total < 1:
        raise ValueError(f"num_images must be at least 1, got {total}")
    check_labels_fit(total)
    return equal_shares(total, ids) if order == "balanced" else random_labels(total, ids, seed)


def check_labels_fit(count: int) -> None:
    """Raises ValueError if memory cannot hold the labels of so many images while they are made."""
    check_memory(LABEL_BYTES * count, torch.device("cpu"), f"the labels of num_images={count}")


def balanced_labels(num_images: int, num_classes: int, seed: int) -> Tensor:
    """Returns labels (num_images,) int64, each class as often as any other (± 1), in seeded random order."""
    return shuffled(torch.arange(num_images) % max(1, num_classes), seed)


def shuffled(labels: Tensor, seed: int) -> Tensor:
    """Returns labels (n,) in seeded random order."""
    return labels[torch.randperm(len(labels), generator=generator_for(seed, "labels", 0))]


def equal_shares(num_images: int, ids: Sequence[int]) -> Tensor:
    """Returns labels (num_images,) int64: these classes in equal shares (± 1), one after another."""
    return torch.tensor(ids)[torch.arange(num_images) * len(ids) // num_images]


def random_labels(num_images: int, ids: Sequence[int], seed: int) -> Tensor:
    """Returns labels (num_images,) int64, drawn from these classes: label i by (seed, i) alone."""
    draws = [
        torch.randint(len(ids), (), generator=generator_for(seed, "label", i)) for i in range(num_images)
    ]
    return torch.tensor(ids)[torch.stack(draws)]
