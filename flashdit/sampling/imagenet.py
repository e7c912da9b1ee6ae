"""What ImageNet's classes are called: WordNet ids and words of classes known by folder or by number alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

NUM_CLASSES = 1000
WORDNET_ID = re.compile(r"n\d{8}")


class ImageNetClass(NamedTuple):
    """A class of ImageNet."""

    wordnet_id: str
    words: str
    """Such as `tench, Tinca tinca`."""


@cache
def _tables() -> tuple[list[str], dict[str, str]]:
    """Returns the WordNet ids of the 1,000 classes in order, and the words of each id that timm knows."""
    from timm.data.imagenet_info import ImageNetInfo  # 1 s to import, which other classes need not wait for

    thousand, words = ImageNetInfo(), {}
    for subset in (ImageNetInfo("imagenet-22k"), thousand):
        words |= {name: subset.label_name_to_description(name) for name in subset.label_names()}
    return thousand.label_names(), words


def imagenet_classes(class_names: Sequence[str]) -> dict[int, ImageNetClass]:
    """Returns by number those of a model's classes that are ImageNet's.

    They are if their names are WordNet ids, or if a model of 1,000 classes has only numbers for names, as
    published latents have: then they are taken in ImageNet's order.
    """
    if len(class_names) == NUM_CLASSES and list(class_names) == [str(i) for i in range(NUM_CLASSES)]:
        class_names = _tables()[0]
    return {
        number: ImageNetClass(name, _tables()[1][name])
        for number, name in enumerate(class_names)
        if WORDNET_ID.fullmatch(name) and name in _tables()[1]
    }


def shown_names(class_names: Sequence[str]) -> list[str]:
    """Returns what people call the classes: the first of ImageNet's words, or else the class's own name."""
    known = imagenet_classes(class_names)
    return [
        known[number].words.split(",")[0] if number in known else name
        for number, name in enumerate(class_names)
    ]
