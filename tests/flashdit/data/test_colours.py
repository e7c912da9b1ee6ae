"""The pixels of files made byte by byte: transparent colours, frames, alpha and orientation."""

import io
import struct

import numpy as np
import pytest
from image_bytes import bmp, gif, png
from PIL import Image

from flashdit.data.images import decode_image, image_sides

RANDOM = np.random.default_rng(0).integers(0, 65536, (11, 13, 3))
BACKGROUND = 50, 60, 70


@pytest.fixture
def decoded(tmp_path):
    """Returns a function: bytes of a file → its pixels over `BACKGROUND`, int (h, w, 3), and transparency."""

    def read(data):
        (tmp_path / "a.png").write_bytes(data)
        picture, transparent, _ = decode_image(tmp_path / "a.png", BACKGROUND)
        assert picture.mode == "RGB"
        return np.asarray(picture).astype(int), transparent

    return read


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_grey_of_a_png_is_compared_in_its_own_depth(decoded, bits, interlaced):
    values = RANDOM[..., 0] >> (16 - bits)
    key = int(values[3, 4])
    grey = np.round(values * 255 / (2**bits - 1))[..., None].repeat(3, 2)
    got, transparent = decoded(png(values, bits, 0, (key,), interlaced=interlaced))
    assert (got == np.where((values == key)[..., None], BACKGROUND, grey)).all()
    assert transparent
    absent = next((value for value in range(2**bits) if value not in values), None)
    if absent is not None:
        got, transparent = decoded(png(values, bits, 0, (absent,), interlaced=interlaced))
        assert (got == grey).all()
        assert not transparent


def test_of_a_key_only_the_bits_of_the_files_depth_count(decoded):
    values = RANDOM[..., 0] >> 12
    plain, _ = decoded(png(values, 4, 0, (5,)))
    assert (decoded(png(values, 4, 0, (0xFF15,)))[0] == plain).all()
    assert (plain[values == 5] == BACKGROUND).all()


@pytest.mark.parametrize("interlaced", [False, True])
def test_the_transparent_colour_of_a_16_bit_png_is_compared_in_16_bits(decoded, interlaced):
    values = RANDOM.copy()
    key = 0x1234, 0x5678, 0x9ABC
    values[2, 3] = key
    values[0, :3] = (0x1233, 0x5678, 0x9ABC), (0x3400, 0x7800, 0xBC00), (0x1234, 0x5678, 0x9ABD)
    got, transparent = decoded(png(values, 16, 2, key, interlaced=interlaced))
    expected = values >> 8
    expected[2, 3] = BACKGROUND
    assert (got == expected).all()
    assert transparent
    assert not decoded(png(RANDOM, 16, 2, (1, 2, 3)))[1]


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_of_16_bit_colour_the_upper_byte_is_taken(decoded, channels):
    values = np.random.default_rng(1).integers(0, 65536, (5, 6, channels))
    got, _ = decoded(png(values, 16, {2: 4, 3: 2, 4: 6}[channels]))
    upper = values >> 8
    alpha = upper[..., -1:] / 255 if channels != 3 else 1
    colour = upper[..., :3] if channels > 2 else upper[..., :1]
    assert np.abs(got - (colour * alpha + np.array(BACKGROUND) * (1 - alpha))).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_alpha_that_hides_nothing_is_no_transparency(decoded, mode):
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), "red").convert(mode).save(buffer, "png")
    assert not decoded(buffer.getvalue())[1]
    picture = Image.new("RGBA", (5, 4), "red")
    picture.putpixel((4, 3), (0, 0, 0, 254))
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    assert decoded(buffer.getvalue())[1]


PALETTE = [[10, 20, 30], [200, 0, 0], [0, 200, 0], [0, 0, 200]]


@pytest.mark.parametrize("key", [None, 2])
@pytest.mark.parametrize("palette", [PALETTE, [[v] * 3 for v in range(4)]], ids=["colours", "greys"])
def test_where_a_gifs_first_frame_leaves_the_screen_free_the_background_shows(decoded, palette, key):
    frame = np.array([[1, 0, 3, 1], [3, 1, 2, 0], [0, 1, 1, 3]])
    got, transparent = decoded(gif((10, 8), (3, 2), frame, palette, key))
    expected = np.empty((8, 10, 3))
    expected[:] = BACKGROUND
    expected[2:5, 3:7] = np.where((frame == key)[..., None], BACKGROUND, np.array(palette)[frame])
    assert (got == expected).all()
    assert transparent
    assert not decoded(gif((4, 3), (0, 0), frame, palette))[1]


def test_fields_of_16_bits_and_alpha_of_32_are_read_and_alpha_of_16_is_refused(decoded):
    values = RANDOM[..., 0]
    red, green, blue = values >> 11, values >> 5 & 63, values & 31
    expected = np.stack([red * 255 / 31, green * 255 / 63, blue * 255 / 31], -1)
    assert np.abs(decoded(bmp(values, (0xF800, 0x7E0, 0x1F), 16))[0] - expected).max() <= 1
    assert np.abs(decoded(bmp(values, (0xF800, 0x7E0, 0x1F, 0), 16))[0] - expected).max() <= 1
    with pytest.raises(ValueError, match=r"a.png is not: BMP of 16 bits with alpha is not read: convert it"):
        decoded(bmp(values, (0x7C00, 0x3E0, 0x1F, 0x8000), 16))
    masks = 0xFF0000, 0xFF00, 0xFF, 0xFF000000
    values = values * 65536 + RANDOM[..., 1]
    alpha = (values >> 24)[..., None] / 255
    colour = np.stack([values >> 16 & 255, values >> 8 & 255, values & 255], -1)
    expected = colour * alpha + np.array(BACKGROUND) * (1 - alpha)
    assert np.abs(decoded(bmp(values, masks, 32))[0] - expected).max() <= 1


ORIENTED = b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"  # orientation 6
EXIF = {
    "orientation 9": (b"\x01\0" + ORIENTED.replace(b"\x06", b"\x09") + bytes(4), False),
    "orientation 0": (b"\x01\0" + ORIENTED.replace(b"\x06", b"\x00") + bytes(4), False),
    "orientation as text": (b"\x01\0\x12\x01\x02\0\x02\0\0\0\x36\0\0\0" + bytes(4), False),
    "no values": (b"\x01\0\x12\x01\x03\0\0\0\0\0\x06\0\0\0" + bytes(4), False),
    "unknown type": (b"\x01\0\x12\x01\x63\0\x01\0\0\0\x06\0\0\0" + bytes(4), False),
    "bytes at random": (b"\xff" * 30, False),
    "nothing": (b"", False),
    "cut off": (b"\x05\0" + ORIENTED, True),
    "another tag points out of the file": (
        b"\x02\0" + ORIENTED + struct.pack("<HHII", 0x8769, 4, 1, 0xFFFFFFF0) + bytes(4),
        True,
    ),
    "another tag has another type": (
        b"\x02\0" + ORIENTED + struct.pack("<HHI", 0x010F, 11, 1) + b"\0\0\xc0\x7f" + bytes(4),
        True,
    ),
}


@pytest.mark.parametrize("name", EXIF)
def test_a_broken_exif_costs_no_picture(decoded, name):
    directory, turned = EXIF[name]
    picture = Image.fromarray(np.kron(RANDOM[:2, :3] >> 8, np.ones((8, 8, 1))).astype(np.uint8))
    for suffix, options in (("jpeg", {"quality": 98, "subsampling": 0}), ("png", {})):
        buffer = io.BytesIO()
        picture.save(buffer, suffix, exif=b"Exif\0\0II*\0\x08\0\0\0" + directory, **options)
        expected = np.rot90(picture, -1) if turned else np.asarray(picture)
        got, _ = decoded(buffer.getvalue())
        assert got.shape == expected.shape, suffix
        assert np.abs(got - expected).max() <= 20, suffix


def test_what_an_unreadable_exif_says_is_not_guessed(decoded, monkeypatch):
    def broken(_):
        raise SyntaxError("not an EXIF")

    monkeypatch.setattr(Image.Image, "getexif", broken)
    got, _ = decoded(png(RANDOM >> 8, 8, 2))
    assert (got == RANDOM >> 8).all()


def test_an_animations_own_still_picture_is_its_first_frame(decoded):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    for suffix in ("png", "webp", "gif"):
        for default in (False, True):
            buffer = io.BytesIO()
            extra = {"default_image": default} if suffix == "png" else {"lossless": True}
            frames[0].save(buffer, suffix, save_all=True, append_images=frames[1:], **extra)
            assert (decoded(buffer.getvalue())[0] == [255, 0, 0]).all(), (suffix, default)


def test_an_adobe_jpeg_of_cmyk_is_no_negative(decoded):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 40, 90)).convert("CMYK").save(buffer, "jpeg", quality=98)
    assert b"Adobe" in buffer.getvalue()
    assert np.abs(decoded(buffer.getvalue())[0] - [200, 40, 90]).max() <= 6


@pytest.mark.parametrize(
    ("pixels", "got"), [(101, "101 × 1"), (200, "200 × 1"), (201, "more than twice as many")]
)
def test_more_pixels_than_the_limit_are_refused_by_one_number(tmp_path, monkeypatch, pixels, got):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # beyond twice that Pillow itself refuses
    (tmp_path / "a.png").write_bytes(png(np.zeros((1, pixels), int), 8, 0))
    for read in (decode_image, image_sides):
        with pytest.raises(
            ValueError, match=f"a.png is not: an image must have at most 100 pixels, got {got}$"
        ):
            read(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(png(np.zeros((1, 100), int), 8, 0))
    assert decode_image(tmp_path / "a.png").picture.size == (100, 1)
