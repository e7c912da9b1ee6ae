"""Is each face that is used a whole alphabet, and is each letter what its distance field says?"""

import numpy as np
import pytest
from matplotlib import get_data_path
from PIL import Image
from scipy.ndimage import distance_transform_edt

from flashdit.glyphs.fonts import (
    EM,
    FIELD_REACH,
    FIELD_SIZE,
    HELD_OUT_FAMILIES,
    LETTERS,
    TRAINING_FAMILIES,
    distance_field,
    font_file,
    letter_mask,
)

FAMILIES = [*TRAINING_FAMILIES.values(), *HELD_OUT_FAMILIES.values()]
FACES = [face for faces in FAMILIES for face in faces]


def ink(face: str, letter: str) -> np.ndarray:
    """Returns which of 80 × 80 pixels are ink."""
    return np.asarray(letter_mask(face, letter, 48, 80)) >= 128


@pytest.mark.parametrize("face", FACES)
def test_every_face_draws_26_letters_which_are_no_boxes(face):
    alphabet = [ink(face, letter) for letter in LETTERS]
    missing = ink(face, "\U0010fffd")  # no character: what a face draws for one that it lacks
    assert all(letter.sum() > 60 for letter in alphabet)
    assert len({letter.tobytes() for letter in [*alphabet, missing]}) == 27


@pytest.mark.parametrize("face", ["DejaVuSansDisplay", "DejaVuSerifDisplay", "STIXNonUni"])
def test_display_cuts_and_symbols_draw_no_letters_and_are_not_used(face):
    assert len({ink(face, letter).tobytes() for letter in LETTERS}) == 1
    assert face not in FACES


def test_families_are_whole_and_no_face_or_drawing_is_in_two():
    assert not TRAINING_FAMILIES.keys() & HELD_OUT_FAMILIES.keys()
    assert len(FACES) == len({*FACES}) == 22
    drawings = [b"".join(ink(face, letter).tobytes() for letter in LETTERS) for face in FACES]
    assert len({*drawings}) == 22
    cuts = {path.stem for path in (font_file("cmr10").parent).glob("*.ttf")}
    for start in ("DejaVuSans", "DejaVuSerif", "STIXGeneral"):
        own = {cut for cut in cuts if cut.startswith(start) and not cut.endswith("Display")}
        assert own == {face for face in FACES if face.startswith(start)}
    assert font_file("cmr10").is_relative_to(get_data_path())


def test_a_field_is_the_distance_to_the_outline_and_its_box_holds_the_ink():
    field, (width, height) = distance_field("cmss10", "L")
    mask = letter_mask("cmss10", "L", EM * 4, FIELD_SIZE * 4)
    left, top, right, bottom = mask.getbbox()
    for low, high, side in ((left, right, width), (top, bottom, height)):
        assert FIELD_SIZE - side <= low / 2  # low is in quarters of a pixel of the field
        assert high / 2 <= FIELD_SIZE + side <= high / 2 + 12
    solid = np.asarray(mask) >= 128
    exact = np.where(solid, distance_transform_edt(solid), -distance_transform_edt(~solid))[2::4, 2::4] / 4
    found = (np.asarray(field) - 127.5) / 127.5 * FIELD_REACH
    assert np.abs(found - exact.clip(-FIELD_REACH, FIELD_REACH)).max() < 0.5
    assert isinstance(field, Image.Image)
