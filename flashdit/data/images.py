"""Which images does a folder hold, and what are the RGB pixels of each? The one walker and the one reader."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageColor, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from flashdit.data.colours import DecodedImage, decode
from flashdit.data.tiff import unknown_tiff
from flashdit.data.walk import IMAGE_FORMATS, IMAGE_SUFFIXES, Walk
from flashdit.shared.command import is_first_process
from flashdit.shared.paths import printable
from flashdit.shared.registry import counted

logger = logging.getLogger(__name__)
READERS = min(8, os.cpu_count() or 1)  # threads that decode; Pillow lets them run side by side
WHITE = (255, 255, 255)
NAMED_AT_MOST = 10  # unreadable files that are named one by one


@dataclass(frozen=True)
class FoundImages:
    """The images below a folder, by class and within each by their path, and what else lies there."""

    root: Path
    class_names: tuple[str, ...]
    paths: tuple[Path, ...]
    num_bytes: tuple[int, ...]
    """Of each file."""
    labels: tuple[int, ...]
    """Place of each image's class in `class_names`."""
    left_out: Mapping[str, int]
    """How many entries were left out, by the reason: `.txt`, `hidden`, `loose`."""
    unreadable: Mapping[str, str]
    """Why an entry is no image though it should be one, by its name below the root: a link to nothing."""
    links: int
    """Links that were followed."""

    def describe(self, unreadable: int | None = None, *remarks: str) -> str:
        """Returns one line: what was found, and what was left out and why.

        Args:
            unreadable: Files left out because they cannot be read; None: those that the walk knows of.
            remarks: What `enlarged_images` and `transparent_images` say, where the images have been read.
        """
        broken = len(self.unreadable) if unreadable is None else unreadable
        count = len(self.paths) + len(self.unreadable) - broken
        line = f"{counted(count, 'image')} in {counted(len(self.class_names), 'class', 'classes')}"
        left_out = [f"{number:,} {reason}" for reason, number in self.left_out.items()]
        left_out += [f"{broken:,} unreadable"] if broken else []
        parts = [line, f"left out: {', '.join(left_out)}" if left_out else "", *remarks]
        parts += [f"{counted(self.links, 'link')} followed"] if self.links else []
        return f"{printable(self.root)}: {'; '.join(part for part in parts if part)}"


def find_images(root: Path, class_names: Sequence[str] = (), called: str = "data.path") -> FoundImages:
    """Returns the images below a folder: its visible sub-folders are the classes, each searched to any depth.

    Hidden files and folders are no data. Links are followed; one that leads nowhere or back is noted. A
    folder without sub-folders is one class of the folder's name.

    Args:
        root: The folder.
        class_names: Of an earlier walk, which keep their place; new ones come after them. Empty: natural
            order, 2 before 10.
        called: What messages call the folder.

    Raises:
        ValueError: If it is no folder or holds no image, or a class has none.
    """
    if not root.is_dir():
        raise ValueError(f"{called} must be a folder of images, got {printable(root)}")
    walk = Walk(root)
    classes = walk.folders(class_names)
    empty = [
        name for name, files in classes.items() if not files and (name in class_names or not class_names)
    ]
    if not any(classes.values()):
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        left_out = ", ".join(f"{number:,} {reason}" for reason, number in walk.left_out.items())
        raise ValueError(
            f"{called} must hold images ({suffixes}), got none in {printable(root)}"
            + (f"; left out: {left_out}" if left_out else "")
        )
    if empty:
        raise ValueError(
            f"every class folder must hold an image, {printable(root)} has without: "
            f"{printable(', '.join(empty))}"
        )
    missing = [name for name in class_names if name not in classes]
    if missing:
        raise ValueError(
            f"the classes of before must still be in {printable(root)}, it lacks "
            f"{printable(', '.join(missing))}"
        )
    names = [*class_names, *(name for name, files in classes.items() if files and name not in class_names)]
    files = [(path, size, label) for label, name in enumerate(names) for path, size in classes[name]]
    return FoundImages(
        root=root,
        class_names=tuple(names),
        paths=tuple(Path(path) for path, _, _ in files),
        num_bytes=tuple(size for _, size, _ in files),
        labels=tuple(label for _, _, label in files),
        left_out=dict(walk.left_out),
        unreadable=walk.unreadable,
        links=walk.links,
    )


def decode_image(path: Path, background: tuple[int, int, int] = WHITE) -> DecodedImage:
    """Returns an image file as upright RGB, 8 bits a channel; of an animation the first frame.

    Transparent pixels show the background. Grey of other than 8 unsigned bits is scaled from 0 to the largest
    number of its kind, floating point from 0–1, and 32-bit integers from 0–65,535 where none is larger. Of
    16-bit colour the upper byte is taken. Colour profiles are not applied.

    Args:
        path: A file of one of `IMAGE_FORMATS`, whatever its name.
        background: Red, green and blue, 0–255.

    Raises:
        ValueError: If it cannot be read, has more than `Image.MAX_IMAGE_PIXELS`, or numbers out of range.
    """
    with _opened(path) as file:
        return decode(file, background)


def read_image(path: Path, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Returns the picture of `decode_image`."""
    return decode_image(path, background).picture


def read_numbers(path: Path) -> np.ndarray:
    """Returns the numbers that an image file stores, (H, W) or (H, W, C) integers: what a label image holds.

    Of a palette they are its places and not its colours, of one bit 0 and 1; nothing is turned or scaled.

    Raises:
        ValueError: As `decode_image` does.
    """
    with _opened(path) as file:
        numbers = np.array(file)
    return numbers.astype(np.uint8) if numbers.dtype == bool else numbers


def image_sides(path: Path) -> tuple[int, int]:
    """Returns the two sides of an image file in pixels, as its head has them; nothing is decoded.

    Raises:
        ValueError: If the head cannot be read, or tells of more than `Image.MAX_IMAGE_PIXELS`.
    """
    with _opened(path) as file:
        return file.size


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile]:
    """Gives an image file, of which nothing is decoded yet; whatever goes wrong names the file."""
    _silence_pillow()
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")  # opening a pipe would wait for ever
        with _identified(path) as file:
            _check_pixels(file.width, file.height)
            yield file
    except MemoryError:
        raise
    except Exception as error:  # decoders raise SyntaxError, struct.error and others on a broken file
        reason = printable(error.strerror or error) if isinstance(error, OSError) else printable(error)
        raise ValueError(f"every image must be readable, {printable(path)} is not: {reason}") from error


def _identified(path: Path) -> ImageFile:
    """Returns an image file whose head Pillow has read."""
    try:
        return Image.open(path, formats=IMAGE_FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError(unknown_tiff(path) or "cannot identify image file") from error
    except Image.DecompressionBombError as error:  # names twice the limit, at which Pillow itself refuses
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise ValueError(f"an image must have at most {limit} pixels, got more than twice as many") from error


def _check_pixels(width: int, height: int) -> None:
    """Raises ValueError for more pixels than `Image.MAX_IMAGE_PIXELS`, at which Pillow would only warn."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise ValueError(f"an image must have at most {limit:,} pixels, got {width} × {height}")


def _silence_pillow() -> None:
    """Keeps Pillow's warnings of a file's inside off the terminal, once a process.

    Not `catch_warnings`, which restores the wrong filters where several threads read.
    """
    kept = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
    if kept not in warnings.filters:
        warnings.filterwarnings("ignore", module=r"PIL\.")


def check_crop(extent: tuple[int, int], size: int) -> None:
    """Raises ValueError for an image so elongated that scaling its short side to `size` exceeds the limit.

    Args:
        extent: Width and height.
        size: In pixels.
    """
    short, long = sorted(extent)
    _check_pixels(size, size * long // short)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Returns the central square of an image at the given side.

    Halves with a box filter while the short side is at least twice the target, then bicubic, then crops.

    Raises:
        ValueError: As `check_crop` does.

    Source: ADM's `center_crop_arr` (Dhariwal & Nichol 2021), which ImageNet figures are made with.
    """
    check_crop(image.size, size)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def crop_of_file(picture: Image.Image, size: int, path: Path) -> Image.Image:
    """Returns the `centre_crop` of what was read of a file, which an error names."""
    try:
        return centre_crop(picture, size)
    except ValueError as error:
        raise ValueError(f"every image must be readable, {printable(path)} is not: {error}") from error


def parse_background(name: str) -> tuple[int, int, int]:
    """Returns red, green and blue, 0–255, of a colour's name or `#rrggbb`.

    Raises:
        ValueError: If it is neither.
    """
    try:
        colour = ImageColor.getrgb(name)
    except (ValueError, AttributeError):
        colour = ()
    if len(colour) != 3:  # four with alpha
        raise ValueError(f"background must be a colour's name or #rrggbb, got {name!r}")
    return colour


def enlarged_images(short_sides: Mapping[str, int], image_size: int) -> str:
    """Returns how many images are enlarged for a side, in words; nothing where none is.

    Args:
        short_sides: Short side of each image in pixels, by name; larger ones may be missing.
        image_size: In pixels.
    """
    small = {name: side for name, side in short_sides.items() if side < image_size}
    if not small:
        return ""
    name = min(small, key=small.__getitem__)
    were, times = "was" if len(small) == 1 else "were", image_size / small[name]
    return f"{len(small):,} smaller than {image_size} px {were} enlarged, {printable(name)} {times:.1f} times"


def transparent_images(count: int | None, background: str) -> str:
    """Returns how many images the background shows through, in words; nothing for none or None, unknown."""
    verb = "is" if count == 1 else "are"
    return f"{count:,} with transparency {verb} shown over {background}" if count else ""


def animated_images(count: int | None) -> str:
    """Returns of how many files later frames are left out, in words; nothing for none or None, unknown."""
    return f"of {count:,} with several frames the first is taken" if count else ""


def report_images(line: str, unreadable: Mapping[str, str]) -> None:
    """Logs what was found, and each unreadable file with the reason, on the main process alone."""
    if not is_first_process():
        return
    for name, why in [*unreadable.items()][:NAMED_AT_MOST]:
        logger.warning("skipped %s, which cannot be read: %s", printable(name), why)
    if len(unreadable) > NAMED_AT_MOST:
        logger.warning("and %s more that cannot be read", f"{len(unreadable) - NAMED_AT_MOST:,}")
    logger.info(line)
