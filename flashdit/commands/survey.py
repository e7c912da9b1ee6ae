"""What does a folder of images hold, as far as the sizes of a model follow from it?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from flashdit.data.images import (
    NAMED_AT_MOST,
    READERS,
    FoundImages,
    enlarged_images,
    find_images,
    image_sides,
    read_image,
)
from flashdit.shared.paths import printable
from flashdit.shared.progress import progress_bar
from flashdit.shared.registry import counted

SEEN_AT_MOST = 2_000  # files whose head is read, spread over the folder
DECODED_AT_MOST = 300e6  # pixels of a folder whose every file is decoded, which takes some seconds
IMAGE_SIZES = (32, 64, 128, 256)
"""Sides that are chosen from where none is given."""
MUCH = 1 / 3
"""The share of an image that may be cropped away on average without a word."""


@dataclass(frozen=True)
class Survey:
    """The images of a folder, and the sides of as many as were looked at."""

    found: FoundImages
    sides: dict[str, tuple[int, int]]
    """In pixels, by name below the folder."""
    unreadable: dict[str, str]
    """Why others could not be read, by name."""
    decoded: bool
    """Whether every file was decoded, as training does, instead of only the heads of some."""

    @property
    def num_images(self) -> int:
        """Images that are not known to be unreadable."""
        return len(self.found.paths) - len(self.unreadable)

    def image_size(self, at_least: int = 1) -> int:
        """Returns the largest of `IMAGE_SIZES` that half of the images have without being enlarged.

        Args:
            at_least: The least that can be trained on, which is returned where the images are smaller.
        """
        short = [min(sides) for sides in self.sides.values()]
        fits = [size for size in IMAGE_SIZES if 2 * sum(side >= size for side in short) >= len(short)]
        return max(at_least, fits[-1] if fits else IMAGE_SIZES[0])

    def cropped_share(self) -> float:
        """Returns the share of an image that a centre crop leaves out, on average."""
        return sum(1 - min(sides) / max(sides) for sides in self.sides.values()) / len(self.sides)

    def describe(self, image_size: int) -> list[str]:
        """Returns lines: what becomes of the images at a size, and which cannot be read."""
        short = {name: min(sides) for name, sides in self.sides.items()}
        lines = [f"{_range(short.values())} on the short side; trained on at {image_size}×{image_size}"]
        if not self.decoded:
            looked = len(self.sides) + len(self.unreadable)
            lines[0] += (
                f" (by the heads of {counted(looked, 'file')}; training decodes all and leaves broken ones "
                "out)"
            )
        enlarged = enlarged_images(short, image_size)
        if len(short) > 1 and all(side < image_size for side in short.values()):
            enlarged = f"all of them, {enlarged}: nothing finer than they are is learnt"
        lines += [enlarged] if enlarged else []
        if self.cropped_share() > MUCH:
            lines.append(
                f"{self.cropped_share():.0%} of an image is cropped away on average: only the centre square "
                "is trained on"
            )
        lines += [
            f"cannot be read, left out of training and refused by scoring: {printable(name)}: {why}"
            for name, why in [*self.unreadable.items()][:NAMED_AT_MOST]
        ]
        return lines


def survey_folder(root: Path) -> Survey:
    """Returns what a folder holds: all files of a small one decoded, of a large one the heads of some.

    Raises:
        ValueError: If it is no folder, a class is empty, or fewer than two images can be read.
    """
    found = find_images(root, called="--images")
    paths = _spread(found.paths, SEEN_AT_MOST)
    sides, unreadable = _read(root, paths, image_sides, "read heads")
    pixels = sum(width * height for width, height in sides.values())
    decoded = len(paths) == len(found.paths) and pixels <= DECODED_AT_MOST
    if decoded:
        readable = [path for path in paths if path.relative_to(root).as_posix() in sides]
        sides, broken = _read(root, readable, lambda path: read_image(path).size, "decode")
        unreadable |= broken
    survey = Survey(found, sides, unreadable, decoded)
    if min(survey.num_images, len(sides)) < 2:
        raise ValueError(f"--images must hold at least 2 images that can be read, got {len(sides)} in {root}")
    return survey


def _read(
    root: Path, paths: Sequence[Path], look: Callable[[Path], tuple[int, int]], called: str
) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Returns the sides of those that can be read, and why others cannot be, by name below the root."""

    def try_one(path: Path) -> tuple[int, int] | str:
        try:
            return look(path)
        except ValueError as error:
            return str(error.__cause__ or error)

    sides, unreadable = {}, {}
    with ThreadPoolExecutor(READERS) as readers:
        bar = progress_bar(readers.map(try_one, paths), total=len(paths), desc=called, leave=False)
        for path, seen in zip(paths, bar, strict=True):
            name = path.relative_to(root).as_posix()
            if isinstance(seen, str):
                unreadable[name] = seen
            else:
                sides[name] = seen
    return sides, unreadable


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    """Returns at most `count` of the paths, evenly spread."""
    step = max(1.0, len(paths) / count)
    return [paths[int(place * step)] for place in range(min(count, len(paths)))]


def _range(values: Iterable[int]) -> str:
    """Returns the least and the largest number of pixels."""
    numbers = sorted(values)
    low, high = numbers[0], numbers[-1]
    return f"{low} px" if low == high else f"{low} to {high} px"
