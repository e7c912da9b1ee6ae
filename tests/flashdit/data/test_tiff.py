"""Kinds of TIFF, made byte by byte: each is read as TIFF 6.0 has it, or refused by its kind."""

import numpy as np
import pytest
from image_bytes import tiff
from PIL import Image

from flashdit.data.images import decode_image, read_image

SHAPE = 6, 8
RANDOM = np.random.default_rng(0).integers(0, 65536, (*SHAPE, 4))
GREY = np.linspace(0, 1, 48).reshape(SHAPE)
HOW = pytest.mark.parametrize("how", [{}, {"deflated": True}], ids=["plain", "deflated"])
ORDER = pytest.mark.parametrize("order", "<>")


@pytest.fixture
def pixels(tmp_path):
    """Returns a function: bytes of a TIFF → its pixels, int (h, w, 3)."""

    def read(data):
        (tmp_path / "a.tif").write_bytes(data)
        return np.asarray(read_image(tmp_path / "a.tif")).astype(int)

    return read


def over_white(rgb, alpha):
    return np.round(rgb * (alpha / 255) + 255 * (1 - alpha / 255))


@HOW
@ORDER
@pytest.mark.parametrize("extra", [None, 0, 1, 2], ids=["RGB", "other", "multiplied", "alpha"])
@pytest.mark.parametrize("bits", [8, 16])
def test_channels_in_separate_planes_are_joined(pixels, bits, order, extra, how):
    channels = 3 if extra is None else 4
    values = RANDOM[..., :channels] >> (16 - bits)
    rgb, alpha = (
        (values[..., :3], values[..., 3:]) if bits == 8 else (values[..., :3] >> 8, values[..., 3:] >> 8)
    )
    if extra == 1:
        values = np.concatenate([values[..., :3] * values[..., 3:] // (2**bits - 1), values[..., 3:]], -1)
    if (bits, extra, how) == (8, 0, {}):  # Pillow has no mode for these
        with pytest.raises(ValueError, match=r"TIFF of 4 × 8 bits .* is not read"):
            pixels(tiff(values, bits, 2, extra=extra, order=order, separate=True, **how))
        return
    got = pixels(tiff(values, bits, 2, extra=extra, order=order, separate=True, **how))
    expected = rgb if extra in (None, 0) else over_white(rgb, alpha)
    assert np.abs(got - expected).max() <= (2 if extra == 1 else 1 if extra == 2 else 0)
    assert (got == pixels(tiff(values, bits, 2, extra=extra, order=order, **how))).all()


@HOW
@pytest.mark.parametrize("bits", [8, 16])
def test_cmyk_is_read_in_either_layout(pixels, bits, how):
    values = RANDOM >> (16 - bits)
    cmyk = values if bits == 8 else values >> 8
    expected = (255 - cmyk[..., :3]) * (255 - cmyk[..., 3:]) / 255
    for separate in (False, True):
        assert np.abs(pixels(tiff(values, bits, 5, separate=separate, **how)) - expected).max() <= 1


@HOW
@pytest.mark.parametrize("separate", [False, True])
def test_ycbcr_is_turned_into_rgb(pixels, separate, how):
    y, cb, cr = np.moveaxis(RANDOM[..., :3] >> 8, -1, 0).astype(float)
    cb, cr = cb - 128, cr - 128
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], -1)  # BT.601
    got = pixels(tiff(RANDOM[..., :3] >> 8, 8, 6, separate=separate, **how))
    assert np.abs(got - rgb.round().clip(0, 255)).max() <= 2


def test_what_pillow_saves_as_ycbcr_comes_back(tmp_path):
    picture = Image.new("RGB", (8, 6), (200, 40, 90))
    picture.convert("YCbCr").save(tmp_path / "a.tif")
    assert np.abs(np.asarray(read_image(tmp_path / "a.tif")).astype(int) - [200, 40, 90]).max() <= 2


@HOW
@ORDER
@pytest.mark.parametrize(
    ("bits", "kind", "white"),
    [(16, 1, 65535), (16, 2, 32767), (8, 2, 127), (32, 2, 65535), (32, 2, 2**31 - 1), (32, 3, 1)],
    ids=["uint16", "int16", "int8", "int32 as 16 bits", "int32", "float32"],
)
def test_grey_numbers_of_each_kind_are_scaled_by_their_range(pixels, bits, kind, white, order, how):
    values = (GREY * white).round() if kind != 3 else GREY.astype(np.float32)
    expected = np.round(values / white * 255)
    assert (pixels(tiff(values, bits, 1, kind, order=order, **how)) == expected[..., None]).all()


@HOW
@pytest.mark.parametrize(("bits", "white"), [(12, 4095), (32, 65535), (32, 2**32 - 1)])
def test_unsigned_grey_of_12_and_32_bits_is_scaled(pixels, bits, white, how):
    values = (GREY * white).round().astype(np.int64)
    assert (pixels(tiff(values, bits, 1, **how))[..., 0] == np.round(values / white * 255)).all()


@HOW
@pytest.mark.parametrize(("bits", "kind"), [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (32, 3)])
def test_where_white_is_zero_the_picture_is_no_negative(pixels, bits, kind, how):
    white = 1 if kind == 3 else 2**bits - 1
    values = GREY if kind == 3 else (GREY * white).round().astype(int)
    expected = 255 - np.round(values / white * 255)
    for separate in (False, True):  # of one channel it makes no difference
        got = pixels(tiff(values, bits, 0, kind, separate=separate, **how))
        assert np.abs(got[..., 1] - expected).max() <= (kind == 3)


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("shift", [0, 8], ids=["16 bits", "8 bits"])
def test_colour_maps_of_16_bits_and_of_8_are_read(pixels, bits, shift):
    colours = np.random.default_rng(bits).integers(0, 65536, (3, 2**bits))
    indices = (GREY * (2**bits - 1)).round().astype(int)
    for separate in (False, True):
        got = pixels(tiff(indices, bits, 3, colours=colours >> shift, separate=separate))
        assert (got == (colours >> 8).T[indices]).all()


def test_lab_is_turned_into_rgb(pixels):
    lab = np.array([[[255, 0, 0], [0, 0, 0], [137, 0, 0], [138, 38, 46], [180, -20, 30]]])  # L·2.55, a and b
    srgb = [
        [255, 255, 255],
        [0, 0, 0],
        [128, 128, 128],
        [200, 100, 50],
        [150, 182, 116],
    ]  # by the formula, D50
    assert np.abs(pixels(tiff(lab & 255, 8, 8))[0] - srgb).max() <= 2


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_planes_and_ycbcr_stand_upright_too(pixels, orientation):
    for values, photometric in ((RANDOM[..., :3], 2), (RANDOM[..., :3] >> 8, 6)):
        bits = 16 if photometric == 2 else 8
        stored = pixels(tiff(values, bits, photometric, separate=photometric == 2))
        got = pixels(tiff(values, bits, photometric, separate=photometric == 2, orientation=orientation))
        assert (got == np.rot90(stored, {1: 0, 3: 2, 6: -1, 8: 1}[orientation])).all()


def test_of_several_pages_the_first_is_read(tmp_path):
    pages = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime")]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert (np.asarray(read_image(tmp_path / "a.tif")) == [255, 0, 0]).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tiff(GREY, 64, 1, 3), r"TIFF of 1 × 64 bits \(floating-point, little-endian, photometric .* 1\)"),
        (tiff(GREY, 16, 1, 3), r"TIFF of 1 × 16 bits \(floating-point"),
        (tiff(RANDOM[..., :3] / 65535, 32, 2, 3), r"TIFF of 3 × 32 bits \(floating-point"),
        (tiff(RANDOM[..., 0], 16, 0, order=">"), r"TIFF of 1 × 16 bits \(unsigned, big-endian, .* 0\)"),
        (tiff(RANDOM[..., :2] >> 8, 8, 1, extra=2, separate=True), "TIFF of LA in separate planes"),
        (tiff(RANDOM[..., :2] >> 8, 8, 1, extra=2, separate=True, deflated=True), "TIFF of LA in separate"),
        (tiff(RANDOM[..., :3] >> 8, 8, 8, separate=True), "TIFF of LAB in separate planes"),
    ],
    ids=["float64", "float16", "float RGB", "white is zero", "grey with alpha", "deflated", "Lab"],
)
def test_a_kind_without_a_right_way_is_refused_by_its_name(pixels, data, message):
    rule = "is not read: convert it to 8- or 16-bit grey, RGB or RGBA"
    with pytest.raises(
        ValueError, match=f"every image must be readable, .*a.tif is not: {message}.* {rule}$"
    ):
        pixels(data)


@pytest.mark.parametrize(
    ("values", "bits", "kind", "message"),
    [
        (GREY * 300 - 200, 16, 2, "integer grey values must be from 0 to 32,767, got -200 to 100"),
        (GREY * 100 - 60, 8, 2, "integer grey values must be from 0 to 127, got -60 to 40"),
        (GREY * 2, 32, 3, "floating-point grey values must be from 0 to 1, got 0 to 2"),
    ],
)
def test_numbers_below_black_or_above_white_are_refused(pixels, values, bits, kind, message):
    with pytest.raises(ValueError, match=f"a.tif is not: {message}"):
        pixels(tiff(values.round() if kind == 2 else values, bits, 1, kind))


def test_a_tiff_that_does_not_tell_black_from_white_is_refused(pixels):
    with pytest.raises(ValueError, match="it has no PhotometricInterpretation"):
        pixels(tiff(RANDOM[..., 0] >> 8, 8, None))


def test_a_truncated_tiff_is_no_unknown_kind(tmp_path):
    (tmp_path / "a.tif").write_bytes(tiff(RANDOM[..., :3], 16, 2)[:-200])
    with pytest.raises(ValueError, match=r"a.tif is not: cannot identify image file$"):
        decode_image(tmp_path / "a.tif")
