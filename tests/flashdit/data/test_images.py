"""What a folder of images holds, and the pixels of each: against plain lines of Pillow and NumPy."""

import io
import logging
import os
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
from hard_pictures import CLASSES, READABLE, disc, make_hard_pictures, sideways, square
from PIL import Image, features

from flashdit.data.images import (
    centre_crop,
    enlarged_images,
    find_images,
    image_sides,
    parse_background,
    read_image,
    report_images,
)


def pixels(path, background=(255, 255, 255)):
    image = read_image(path, background)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def composited(rgba, background):
    """Returns (h, w, 3) of an RGBA array over a colour, by the formula."""
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + np.array(background) * (1 - alpha)


@pytest.mark.parametrize("background", [(255, 255, 255), (10, 200, 30)])
@pytest.mark.parametrize("alpha", [255, 128])
@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_transparent_pixels_show_the_background_and_never_their_hidden_colour(
    tmp_path, suffix, alpha, background
):
    picture = disc(colour=(220, 30, 40, alpha))
    picture.save(tmp_path / f"a.{suffix}", **({"lossless": True, "exact": True} if suffix == "webp" else {}))
    expected = composited(np.asarray(picture), background)
    assert np.abs(pixels(tmp_path / f"a.{suffix}", background) - expected).max() <= 1


def test_grey_with_alpha_is_composited(tmp_path):
    values = np.array([[[10, 255], [10, 0], [10, 51]]], np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert pixels(tmp_path / "a.png")[0, :, 0].tolist() == [10, 255, 206]  # 10·0.2 + 255·0.8


@pytest.mark.parametrize("transparency", [1, b"\xff\x00\x80"], ids=["one index", "one alpha an index"])
def test_palettes_with_transparency_are_composited_without_a_word(tmp_path, transparency, capfd):
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.save(tmp_path / "a.png", transparency=transparency)
    third = [0, 0, 255] if transparency == 1 else [127, 127, 255]
    assert pixels(tmp_path / "a.png")[0].tolist() == [[255, 0, 0], [255, 255, 255], third]
    picture.save(tmp_path / "b.png")
    assert pixels(tmp_path / "b.png")[0, 1].tolist() == [0, 255, 0]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("mode", "key", "colour"), [("L", 7, 7), ("RGB", (1, 2, 3), (1, 2, 3)), ("1", 0, 0)], ids=str
)
def test_the_one_transparent_colour_of_a_png_shows_the_background(tmp_path, mode, key, colour):
    picture = Image.new(mode, (2, 1), colour)
    picture.putpixel((1, 0), 1 if mode == "1" else 200 if mode == "L" else (9, 9, 9))
    picture.save(tmp_path / "a.png", transparency=key)
    assert pixels(tmp_path / "a.png", (50, 60, 70))[0, 0].tolist() == [50, 60, 70]
    assert pixels(tmp_path / "a.png", (50, 60, 70))[0, 1].tolist() != [50, 60, 70]


RAMP = np.linspace(0, 65535, 4096).reshape(64, 64)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bit_grey_is_scaled(tmp_path, name):
    values = RAMP.astype(np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    expected = np.round(values / 65535 * 255)
    assert (pixels(tmp_path / name) == expected[..., None]).all()


def test_big_endian_sixteen_bit_tiff_is_scaled(tmp_path):
    values = RAMP.astype(">u2")
    Image.frombytes("I;16B", (64, 64), values.tobytes()).save(tmp_path / "a.tif")
    assert (pixels(tmp_path / "a.tif")[..., 0] == np.round(values / 65535 * 255)).all()


@pytest.mark.parametrize("top", [65535, 2**31 - 1])
def test_integers_of_32_bits_are_scaled_from_the_range_that_they_need(tmp_path, top):
    values = np.linspace(0, top, 256).astype(np.int32).reshape(16, 16)
    Image.fromarray(values, "I").save(tmp_path / "a.tif")
    assert (pixels(tmp_path / "a.tif")[..., 2] == np.round(values / top * 255)).all()


def test_floats_are_scaled_from_0_to_1_and_others_refused(tmp_path):
    values = np.linspace(0, 1, 256).astype(np.float32).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert np.abs(pixels(tmp_path / "a.tif")[..., 0] - values * 255).max() <= 0.5001
    for wrong, got in ((values * 255, "0 to 255"), (values - 0.5, "-0.5 to 0.5"), (values * np.nan, "nan")):
        Image.fromarray(wrong).save(tmp_path / "b.tif")
        with pytest.raises(ValueError, match=f"b.tif is not: floating-point grey .* from 0 to 1, got {got}"):
            read_image(tmp_path / "b.tif")
    Image.fromarray(np.array([[-5, 70000]], np.int32), "I").save(tmp_path / "c.tif")
    with pytest.raises(ValueError, match=r"integer grey values must be .* got -5 to 70000"):
        read_image(tmp_path / "c.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    upright = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3) * 3
    stored = {  # what a camera stores so that a viewer sees `upright`: TIFF 6.0, tag 274
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.webp", "a.tif"):
        extra = {"lossless": True} if name == "a.webp" else {}
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / name, exif=exif, **extra)
        assert (pixels(tmp_path / name) == upright).all(), name


def test_a_phones_jpeg_stands_upright(tmp_path):
    sideways(square(40, 60), tmp_path / "a.jpg")
    assert np.abs(pixels(tmp_path / "a.jpg") - np.asarray(square(40, 60))).mean() < 4


def test_cmyk_jpegs_have_their_colours(tmp_path):
    square(40, 60, (200, 40, 90)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(pixels(tmp_path / "a.jpg") - np.asarray(square(40, 60, (200, 40, 90)))).mean() < 5


FORMATS = ["bmp", "gif", "jpg", "jfif", "png", "tif", "tiff", "webp"]
FORMATS += [name for name, feature in (("avif", "avif"), ("jp2", "jpg_2000")) if features.check(feature)]


@pytest.mark.parametrize("suffix", FORMATS)
def test_each_format_is_found_and_read(tmp_path, suffix):
    square(40, 60).save(tmp_path / f"a.{suffix}")
    (path,) = find_images(tmp_path).paths
    assert np.abs(pixels(path) - np.asarray(square(40, 60))).mean() < 6


def test_of_an_animation_the_first_frame_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert np.abs(pixels(tmp_path / name) - [255, 0, 0]).max() < 8


def bomb(width, height):
    """Returns a PNG of a few bytes that claims to have so many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def tiff_bomb():
    """Returns a small TIFF whose header is made to claim 60,000 × 60,000 pixels."""
    buffer = io.BytesIO()
    Image.new("L", (7, 5)).save(buffer, "tiff")
    data = buffer.getvalue()
    for tag, side in ((256, 7), (257, 5)):
        at = next(
            at
            for at in range(len(data) - 12)
            if struct.unpack_from("<HHI", data, at)[0] == tag and data[at + 8] == side
        )
        data = data[: at + 2] + struct.pack("<HII", 4, 1, 60_000) + data[at + 12 :]
    return data


BROKEN = {
    "empty": b"",
    "text": b"no picture",
    "twice the limit": bomb(20_000, 20_000),
    "above the limit": bomb(10_000, 9_000),
    "TIFF": tiff_bomb(),
    "no side": bomb(0, 5),
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_what_is_no_picture_is_one_sentence_with_the_files_name(tmp_path, name, suffix, capfd):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(BROKEN[name])
    with pytest.raises(ValueError, match=rf"every image must be readable, .*a\.{suffix} is not: \S"):
        read_image(path)
    assert capfd.readouterr() == ("", "")


def test_more_pixels_than_pillows_limit_are_refused_before_they_are_decoded(tmp_path):
    (tmp_path / "a.png").write_bytes(BROKEN["above the limit"])
    with pytest.raises(
        ValueError, match=r"a.png is not: an image must have at most 89,478,485 pixels, got 10000"
    ):
        read_image(tmp_path / "a.png")


def test_a_format_that_is_not_listed_is_not_read_under_another_name(tmp_path):
    square(8, 8).save(tmp_path / "a.png", format="PPM")
    with pytest.raises(ValueError, match=r"a.png is not: cannot identify image file"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_files_are_named(tmp_path, suffix, share, capfd):
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=rf"every image must be readable, .*a\.{suffix} is not"):
        read_image(path)
    assert capfd.readouterr().err == ""


def test_pillows_warnings_do_not_escape_though_others_do(tmp_path):
    disc().quantize().save(tmp_path / "a.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_image(tmp_path / "a.png")
        Image.open(io.BytesIO(bomb(10_000, 9_000)))
        warnings.warn("of somebody else", stacklevel=1)
    assert [str(one.message) for one in caught] == ["of somebody else"]


def test_a_full_memory_is_no_broken_file(tmp_path, monkeypatch):
    square(8, 8).save(tmp_path / "a.png")

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(Image, "open", full)
    with pytest.raises(MemoryError):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "decoder_error", [SyntaxError("a"), struct.error("a"), IndexError("a"), OSError("a")]
)
def test_each_error_of_a_decoder_is_a_value_error(tmp_path, monkeypatch, decoder_error):
    square(8, 8).save(tmp_path / "a.png")

    def broken(*_, **__):
        raise decoder_error

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(ValueError, match=r"a\.png is not: a"):
        read_image(tmp_path / "a.png")


def center_crop_arr(picture, size):
    """ADM's function of this name, from its guided_diffusion/image_datasets.py."""
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(side // 2 for side in picture.size), resample=Image.Resampling.BOX)
    scale = size / min(*picture.size)
    sides = tuple(round(side * scale) for side in picture.size)
    values = np.array(picture.resize(sides, resample=Image.Resampling.BICUBIC))
    top, left = (values.shape[0] - size) // 2, (values.shape[1] - size) // 2
    return values[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "extent", [(64, 64), (64, 97), (63, 80), (290, 147), (20, 31), (32, 45), (32, 32)], ids=str
)
def test_the_centre_crop_is_adms(extent):
    noise = np.random.default_rng(0).integers(0, 256, (*extent[::-1], 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    assert (np.asarray(centre_crop(picture, 32)) == center_crop_arr(picture, 32)).all()


def test_a_long_thin_image_is_refused_before_it_fills_the_memory():
    with pytest.raises(ValueError, match=r"must have at most 89,478,485 pixels, got 256 × 25600000"):
        centre_crop(Image.new("L", (100_000, 1)), 256)


@pytest.mark.parametrize(
    ("name", "colour"), [("white", (255, 255, 255)), ("#0a0B0c", (10, 11, 12)), ("black", (0, 0, 0))]
)
def test_backgrounds_are_names_or_numbers(name, colour):
    assert parse_background(name) == colour


@pytest.mark.parametrize("name", ["", "whyte", "#12345", "#11223344"])
def test_what_is_no_background_is_named(name):
    with pytest.raises(ValueError, match=f"background must be a colour's name or #rrggbb, got '{name}'"):
        parse_background(name)


def save(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        square(8, 8).save(folder / name)
    return folder


def listed(found):
    return [
        (found.class_names[label], path.relative_to(found.root).as_posix())
        for path, label in zip(found.paths, found.labels, strict=True)
    ]


def test_hard_pictures_are_found_by_class_and_the_rest_is_counted(tmp_path):
    found = find_images(make_hard_pictures(tmp_path / "hard"))
    assert found.class_names == tuple(CLASSES)
    assert len(found.paths) == READABLE + 1
    assert found.left_out == {"hidden": 3, "loose beside the class folders": 1, ".txt": 1}
    line = found.describe(1, enlarged_images({"a": 20, "b": 99}, 32))
    assert line.endswith(
        "hard: 12 images in 3 classes; left out: 3 hidden, 1 loose beside the class folders, 1 .txt, "
        "1 unreadable; 1 smaller than 32 px was enlarged, a 1.6 times"
    )


def test_classes_stand_in_natural_order_and_files_by_their_path(tmp_path):
    save(
        tmp_path,
        "10/a.png",
        "2/b.png",
        "2/10.png",
        "2/9.png",
        "b/x/y/z.png",
        "B/a.png",
        "a2/0.png",
        "a10/0.png",
    )
    found = find_images(tmp_path)
    assert found.class_names == ("2", "10", "a2", "a10", "B", "b")
    assert [name for _, name in listed(found)][:3] == ["2/10.png", "2/9.png", "2/b.png"]
    assert listed(found)[-1] == ("b", "b/x/y/z.png")


def test_stored_class_names_keep_their_place_and_new_ones_follow(tmp_path):
    save(tmp_path, "10/a.png", "2/b.png", "new/c.png", "1/d.png")
    (tmp_path / "empty").mkdir()
    assert find_images(tmp_path, ["10", "2"]).class_names == ("10", "2", "1", "new")
    with pytest.raises(ValueError, match=r"classes of before must still be in .*, it lacks eel"):
        find_images(tmp_path, ["10", "eel"])
    save(tmp_path, ".old/a.png", "@eaDir/b.png")
    assert find_images(tmp_path, [".old", "10", "2"]).class_names == (".old", "10", "2", "1", "new")
    flat = save(tmp_path / "2")
    assert find_images(flat, ["before it was renamed"]).class_names == ("before it was renamed",)


def test_an_empty_class_is_refused_by_name(tmp_path):
    save(tmp_path, "cat/a.png", "eel/a.png")
    (tmp_path / "dog" / "deeper").mkdir(parents=True)
    (tmp_path / "dog" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"every class folder must hold an image, .* has without: dog$"):
        find_images(tmp_path)


def test_hidden_folders_and_resource_forks_are_no_data(tmp_path):
    save(
        tmp_path, "cat/0.png", ".ipynb_checkpoints/0.png", "__MACOSX/cat/0.png", "cat/._0.png", "@eaDir/0.png"
    )
    found = find_images(tmp_path)
    assert listed(found) == [("cat", "cat/0.png")]
    assert found.left_out == {"hidden": 4}


def test_a_folder_named_like_an_image_is_a_folder(tmp_path):
    assert listed(find_images(save(tmp_path, "x.jpg/a.png"))) == [("x.jpg", "x.jpg/a.png")]


def test_links_to_folders_and_files_are_followed(tmp_path):
    real = save(tmp_path / "real", "cat/0.png", "cat/deep/1.png", "dog/2.png")
    images = save(tmp_path / "images", "cat/own.png")
    (images / "dog").symlink_to(real / "dog")
    (images / "cat" / "more").symlink_to(real / "cat")
    (images / "cat" / "one.png").symlink_to(real / "dog" / "2.png")
    found = find_images(images)
    names = [name for _, name in listed(found)]
    assert names == ["cat/more/0.png", "cat/more/deep/1.png", "cat/one.png", "cat/own.png", "dog/2.png"]
    assert found.links == 3
    assert found.describe().endswith("5 images in 2 classes; 3 links followed")


def test_loops_and_links_to_nothing_are_named(tmp_path):
    images = save(tmp_path / "images", "cat/0.png")
    (images / "cat" / "again").symlink_to(images)
    (images / "cat" / "own").symlink_to(images / "cat")
    (images / "cat" / "self").symlink_to(images / "cat" / "self")
    (images / "cat" / "gone.png").symlink_to(images / "absent.png")
    (images / "above").symlink_to(tmp_path)
    found = find_images(images)
    assert listed(found) == [("cat", "cat/0.png")]
    assert dict(found.unreadable) == {
        "above": "a link to a folder that it lies in",
        "cat/again": "a link to a folder that it lies in",
        "cat/gone.png": "a link to nothing",
        "cat/own": "a link to a folder that it lies in",
        "cat/self": os.strerror(40),
    }


def test_pipes_and_sockets_are_named_and_never_opened(tmp_path):
    os.mkfifo(save(tmp_path, "cat/0.png") / "cat" / "pipe.png")
    found = find_images(tmp_path)
    assert dict(found.unreadable) == {"cat/pipe.png": "it is no regular file"}
    with pytest.raises(ValueError, match=r"pipe\.png is not: it is no regular file"):
        read_image(tmp_path / "cat" / "pipe.png")


def test_names_that_are_no_utf_8_are_escaped(tmp_path):
    save(tmp_path, "cat/0.png")
    odd = os.fsencode(tmp_path) + b"/cat/caf\xe9.png"
    with open(odd, "wb") as file:
        file.write((tmp_path / "cat" / "0.png").read_bytes())
    found = find_images(tmp_path)
    assert dict(found.unreadable) == {"cat/caf\\xe9.png": "its name is not UTF-8"}
    os.mkdir(os.fsencode(tmp_path) + b"/eel\xe9")
    with pytest.raises(ValueError, match=r"name of a class folder must be UTF-8, got .*eel\\xe9"):
        find_images(tmp_path)


def test_names_with_line_breaks_and_terminal_codes_are_read_and_shown_on_one_line(tmp_path, caplog):
    odd = "a\nb\x1b[31m\u202ec.png"
    save(tmp_path, f"cat/{odd}", f"cat/絵 {'n' * 200}.png")
    found = find_images(tmp_path)
    assert [read_image(path).size for path in found.paths] == [(8, 8), (8, 8)]
    report_images(enlarged_images({odd: 8}, 32), {odd: "broken"})
    shown = "a\\nb\\x1b[31m\\u202ec.png"
    assert caplog.messages[0] == f"skipped {shown}, which cannot be read: broken"
    assert shown in enlarged_images({odd: 8}, 32)
    found.paths[0].write_bytes(b"no picture")
    with pytest.raises(ValueError, match=re.escape(f"{shown} is not: cannot identify")):
        read_image(found.paths[0])


def test_a_folder_that_may_not_be_opened_is_named(tmp_path, monkeypatch):
    save(tmp_path, "cat/0.png")
    scandir = os.scandir

    def closed(folder):
        if str(folder).endswith("cat"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(
        ValueError, match=r"every folder of images must be readable, .*cat is not: Permission"
    ):
        find_images(tmp_path)


def test_only_the_main_process_reports(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    report_images("2 images", {f"{n}.png": "broken" for n in range(12)})
    assert caplog.messages[0] == "skipped 0.png, which cannot be read: broken"
    assert caplog.messages[-2:] == ["and 2 more that cannot be read", "2 images"]
    assert len(caplog.messages) == 12
    monkeypatch.setenv("RANK", "1")
    report_images("2 images", {})
    assert len(caplog.messages) == 12


def test_sides_are_read_without_decoding(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (30, 200), "red").save(path)
    path.write_bytes(path.read_bytes()[:60])  # the head and the beginning of the pixels
    assert image_sides(path) == (30, 200)
    with pytest.raises(ValueError, match="truncated"):
        read_image(path)
    path.write_bytes(b"no head")
    with pytest.raises(ValueError, match=r"^every image must be readable, .*a.png is not: cannot identify"):
        image_sides(path)


def test_images_beside_a_folder_without_any_are_told_where_none_is_found(tmp_path):
    (tmp_path / "scores").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"got none in .*; left out: 1 loose beside the class folder"):
        find_images(tmp_path)
