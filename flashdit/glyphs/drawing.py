"""One letter as one image: where it stands, how heavy its strokes are, in which colours, on which ground."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flashdit.glyphs.fonts import EM, FIELD_REACH, FIELD_SIZE, LETTERS, distance_field
from flashdit.shared.seeds import generator_for

SEED = 0
GROUNDS = ("plain", "photograph", "both")
MAX_ROTATION = math.radians(12)
MAX_SHEAR = 0.15
EM_SIZES = (0.7, 1.0)
"""Of an em, as shares of the image's side."""
ASPECTS = (0.85, 1.15)
"""Width over height, against the font's own."""
MAX_SHIFT = 0.08
"""Of the letter's centre from the image's, as a share of its side, where there is room."""
MARGIN = 0.03
"""Around the letter's outline, as a share of the side."""
STROKE_WEIGHTS = (-0.003, 0.015)
"""How far an outline is moved outwards, in em."""
DARK, LIGHT = (0, 110), (145, 255)
"""Levels of the darker and the lighter of ink and ground, in every channel."""
ZOOMS = (1.25, 1.75, 2.5)
"""Short sides of a photograph that image-sized pieces are cut from, in sides of an image."""
UNIFORMS = 22
"""Numbers from 0 to 1 that a drawing is made of."""
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
"""Those of scikit-learn."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Everything that one image is made from, besides its size."""

    letter: str
    face: str
    linear: np.ndarray
    """(2, 2): from em, x to the right and y down, to shares of the image's side."""
    shift: tuple[float, float]
    """Of the letter's centre from the image's, in −1 to 1 of what there is room for."""
    weight: float
    """How far the outline is moved outwards, in em."""
    ink: tuple[int, int, int]
    ground: tuple[int, int, int]
    """Of a plain ground, RGB like the ink."""
    ink_is_light: bool
    piece: tuple[float, float, float, float] | None
    """Of a photograph: which one, which zoom, and where, each in 0 to 1; None is a plain ground."""


def draw_numbers(purpose: str, index: int, families: dict[str, tuple[str, ...]], ground: str) -> Drawing:
    """Returns the drawing of an index, which depends on nothing but these: its letter is index modulo 26.

    Args:
        purpose: The split: two splits share no random number.
        index: Not negative.
        families: A family is drawn first, then one of its faces, each as likely as the others.
        ground: Of `GROUNDS`.
    """
    numbers = iter(torch.rand(UNIFORMS, generator=generator_for(SEED, f"glyphs {purpose}", index)).tolist())

    def between(low: float, high: float) -> float:
        return low + (high - low) * next(numbers)

    def one_of(items: tuple[str, ...]) -> str:
        return items[int(next(numbers) * len(items))]

    def colour(levels: tuple[int, int]) -> tuple[int, int, int]:
        return round(between(*levels)), round(between(*levels)), round(between(*levels))

    face = one_of(families[one_of(tuple(families))])
    angle, shear = between(-MAX_ROTATION, MAX_ROTATION), between(-MAX_SHEAR, MAX_SHEAR)
    size, aspect = between(*EM_SIZES), math.sqrt(between(*ASPECTS))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    linear = turn @ np.array([[aspect, shear], [0, 1 / aspect]]) * size
    shift, weight = (between(-1, 1), between(-1, 1)), between(*STROKE_WEIGHTS)
    ink_is_light = next(numbers) < 0.5
    light, dark = colour(LIGHT), colour(DARK)
    ink, plain = (light, dark) if ink_is_light else (dark, light)
    is_photograph = next(numbers) < {"plain": 0.0, "photograph": 1.0, "both": 0.5}[ground]
    place = tuple(next(numbers) for _ in range(4))
    return Drawing(
        letter=LETTERS[index % len(LETTERS)],
        face=face,
        linear=linear,
        shift=shift,
        weight=weight,
        ink=ink,
        ground=plain,
        ink_is_light=ink_is_light,
        piece=place if is_photograph else None,
    )


def draw(drawing: Drawing, image_size: int) -> Tensor:
    """Returns a drawing as an image, uint8 (3, S, S)."""
    if drawing.piece is None:
        image = np.empty((3, image_size, image_size), np.uint8)
        image[:] = np.reshape(drawing.ground, (3, 1, 1))
    else:
        image = piece_of_photograph(drawing.piece, image_size, dark=drawing.ink_is_light)
    share, (left, top) = ink_share(drawing, image_size)
    height, width = share.shape
    box = image[:, top : top + height, left : left + width]
    ink = np.array(drawing.ink, np.float32).reshape(3, 1, 1)
    box[:] = box + (ink - box) * share + 0.5  # rounded, as bytes cut the fraction off
    return torch.from_numpy(image)


def ink_share(drawing: Drawing, image_size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Returns the share of each pixel of a box that is ink, float32 (h, w), and the box's corner (x, y)."""
    field, ink_size = distance_field(drawing.face, drawing.letter)
    extent = np.abs(drawing.linear) @ (np.array(ink_size) / EM + 2 * max(drawing.weight, 0))
    shrunk = min(1.0, (1 - 2 * MARGIN) / extent.max())  # the widest letters, so that they fit
    slack = np.minimum((1 - 2 * MARGIN - shrunk * extent) / 2, MAX_SHIFT)
    centre = image_size * (0.5 + np.array(drawing.shift) * slack)
    half = image_size * shrunk * extent / 2
    corner = np.maximum(np.floor(centre - half).astype(int) - 1, 0)
    end = np.minimum(np.ceil(centre + half).astype(int) + 1, image_size)
    # (2, 2): from pixels of the image to those of the field
    to_field = np.linalg.inv(shrunk * drawing.linear) * EM / image_size
    origin = FIELD_SIZE / 2 + to_field @ (corner - centre)
    data = (*to_field[0], origin[0], *to_field[1], origin[1])
    width, height = (end - corner).tolist()
    sampled = field.transform((width, height), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    pixel = math.sqrt(abs(np.linalg.det(to_field)))  # of the image, in pixels of the field
    return ramp(drawing.weight * EM, pixel)[np.asarray(sampled)], (int(corner[0]), int(corner[1]))


def ramp(offset: float, width: float) -> np.ndarray:
    """Returns the share of a pixel that is ink for each level of a distance field, float32 (256,).

    Args:
        offset: How far the outline is moved outwards, in pixels of the field.
        width: Over which the share goes from 0 to 1: a pixel of the image, in pixels of the field.
    """
    distances = (np.arange(256) - 127.5) / 127.5 * FIELD_REACH + offset
    return np.clip(distances / width + 0.5, 0, 1).astype(np.float32)


@cache
def photograph(name: str) -> Image.Image:
    """Returns one of `PHOTOGRAPHS`, RGB."""
    found = find_spec("sklearn")  # without an import, which takes seconds
    assert found is not None
    assert found.origin is not None
    with Image.open(Path(found.origin).parent / "datasets" / "images" / name) as file:
        return file.convert("RGB")


@cache
def photographs(image_size: int, dark: bool) -> list[list[np.ndarray]]:
    """Returns each photograph at each of `ZOOMS`, uint8 (3, h, w), of `DARK` levels or of `LIGHT` ones."""
    low, high = DARK if dark else LIGHT
    levels = [round(low + (high - low) * level / 255) for level in range(256)]
    zoomed = []
    for name in PHOTOGRAPHS:
        whole = photograph(name)
        factors = [zoom * image_size / min(whole.size) for zoom in ZOOMS]
        sizes = [(round(whole.width * factor), round(whole.height * factor)) for factor in factors]
        pictures = [whole.resize(size, Image.Resampling.BICUBIC).point(levels * 3) for size in sizes]
        zoomed.append([rearrange(np.asarray(picture), "h w c -> c h w").copy() for picture in pictures])
    return zoomed


def piece_of_photograph(
    piece: tuple[float, float, float, float], image_size: int, *, dark: bool
) -> np.ndarray:
    """Returns an image-sized piece of a photograph, uint8 (3, S, S), of `DARK` levels or of `LIGHT` ones."""
    which, zoom, x, y = piece
    zoomed = photographs(image_size, dark)
    picture = zoomed[int(which * len(zoomed))][int(zoom * len(ZOOMS))]
    _, height, width = picture.shape
    left, top = int(x * (width - image_size)), int(y * (height - image_size))
    return picture[:, top : top + image_size, left : left + image_size].copy()
