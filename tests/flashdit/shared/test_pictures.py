import numpy as np
import pytest
import torch
from PIL import Image

from flashdit.shared.pictures import labelled_grid, panel_grid, rows_by_class, save_png, to_uint8

RED, BLUE = (255, 0, 0), (0, 0, 255)


def flat(colour, size=(40, 30)):
    return Image.new("RGB", size, colour)


def extent(picture, colour):
    """Returns (left, top, width, height) of the pixels of a colour."""
    rows, columns = np.nonzero((np.asarray(picture) == colour).all(-1))
    return columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1


def ink(picture):
    """Returns how many pixels are written on: neither white nor of a panel."""
    return (np.asarray(picture).max(-1) < 200).sum()


def test_panels_stand_in_their_rows_and_columns_at_equal_distances():
    rows = [("", [flat(RED), flat(BLUE)]), ("", [flat((0, 255, 0))])]
    picture = panel_grid(rows, gap=4)
    left, top, width, height = extent(picture, RED)
    assert (width, height) == (40, 30)
    assert extent(picture, BLUE)[:2] == (left + 44, top)
    assert extent(picture, (0, 255, 0))[:2] == (left, top + 34)
    assert picture.size == (left + 2 * 44, top + 2 * 34)


@pytest.mark.parametrize(
    ("words", "moves_right", "moves_down"),
    [
        ({"title": "a title"}, False, True),
        ({"heads": ["first", "second"]}, False, True),
        ({"label": "row"}, True, False),
    ],
)
def test_words_are_written_beside_the_panels_and_never_on_them(words, moves_right, moves_down):
    label = words.pop("label", "")
    plain = panel_grid([("", [flat(RED), flat(BLUE)])])
    picture = panel_grid([(label, [flat(RED), flat(BLUE)])], **words)
    before, after = extent(plain, RED), extent(picture, RED)
    assert (after[0] > before[0], after[1] > before[1]) == (moves_right, moves_down)
    assert after[2:] == before[2:]
    assert ink(plain) == 0
    assert ink(picture) > 10


def test_letters_of_other_alphabets_are_no_boxes():
    def drawn(text):
        return np.asarray(panel_grid([(text, [flat(RED, (1, 1))])])).tobytes()

    box = drawn("\uffff")
    assert drawn("字") == box  # none of Chinese, Japanese and Korean
    for letter in "éßşΩЖԹღשعệ":
        assert drawn(letter) != box, letter


def test_a_wide_title_or_head_widens_the_picture():
    narrow = panel_grid([("", [flat(RED)])])
    assert panel_grid([("", [flat(RED)])], title="word " * 20).width > narrow.width + 500
    assert panel_grid([("", [flat(RED)])], ["word " * 20]).width > narrow.width + 500


def test_a_legend_stands_below_all_rows():
    legend = flat((9, 9, 9), (70, 20))
    picture = panel_grid([("", [flat(RED)])], legend=legend)
    _, top, width, height = extent(picture, (9, 9, 9))
    assert (width, height) == (70, 20)
    assert top >= extent(picture, RED)[1] + 30


def test_small_images_are_enlarged_by_whole_factors_and_large_ones_kept():
    def side(size):
        image = torch.zeros(3, size, size, dtype=torch.uint8)
        return extent(labelled_grid([("", [image])]), (0, 0, 0))[2]

    assert [side(size) for size in (16, 30, 64, 100)] == [64, 90, 64, 100]


def test_rows_of_a_class_are_filled_in_order_and_named_once():
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, 3, 1, 1)
    labels = torch.tensor([1, 0, 1, 1, 0])
    rows = rows_by_class(images, labels, ["cat", "hen"], columns=2)
    assert [label for label, _ in rows] == ["cat", "hen", ""]
    assert [[int(image[0, 0, 0]) for image in row] for _, row in rows] == [[1, 4], [0, 2], [3]]


def test_a_name_that_the_font_cannot_write_is_shown_as_its_number():
    names = ["猫", "Ёжик", "γάτα", "cat 猫", "ไก่"]
    rows = rows_by_class(torch.zeros(5, 3, 1, 1, dtype=torch.uint8), torch.arange(5), names, columns=1)
    assert [label for label, _ in rows] == ["class 0", "Ёжик", "γάτα", "class 3", "class 4"]


@pytest.mark.parametrize("off", [-0.4, 0.0, 0.4])
def test_pixels_become_the_nearest_byte(off):
    levels = torch.arange(256)
    images = ((levels + off) / 127.5 - 1).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_uint8(images)[0, 0].flatten(), levels.to(torch.uint8))


def test_a_png_keeps_pixels_and_text(tmp_path):
    image = torch.arange(2 * 3 * 3, dtype=torch.uint8).reshape(3, 2, 3) * 14
    save_png(image, tmp_path / "a.png", {"class": "cat"})
    with Image.open(tmp_path / "a.png") as read:
        assert np.array_equal(np.asarray(read), image.permute(1, 2, 0).numpy())
        assert read.text == {"class": "cat"}
