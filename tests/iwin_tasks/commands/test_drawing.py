import pytest
import torch
from PIL import Image

from iwin_core.analysis import saliency
from iwin_tasks.commands import drawing, reach, visualise

VIOLET, YELLOW = (68, 1, 84), (253, 231, 37)


def colours_of(picture):
    return {pixel for _, pixel in picture.convert("RGB").getcolors(2**20)}


def test_what_is_reached_is_coloured_by_when_it_was():
    reached = torch.tensor([[True, True, False], [True, False, False]])
    before = torch.tensor([[True, False, False], [True, False, False]])
    pixels = drawing.reached_pixels(reached, before, (1, 0)).tolist()
    names = [[drawing.BEFORE, drawing.NEW, drawing.NEVER], [drawing.START, drawing.NEVER, drawing.NEVER]]
    assert [[tuple(pixel) for pixel in row] for row in pixels] == names


def test_receptive_fields_run_from_violet_where_nothing_is_to_yellow_at_the_largest():
    field = torch.zeros(4, 6)
    field[1, 2] = 5.0
    picture = drawing.draw_fields("title", [("layer", field)])
    cell = picture.crop((6, 60, 6 + 6 * 60, 60 + 4 * 60))
    count = {pixel: n for n, pixel in cell.convert("RGB").getcolors(2**20)}
    assert count[VIOLET] > 15 * count[YELLOW] > 0


def test_grad_cam_is_laid_over_the_image():
    images = torch.zeros(1, 3, 4, 6)
    cam = torch.zeros(4, 6)
    cam[0, 0] = 2.0
    found = colours_of(drawing.draw_cams("title", ["layer"], images, [[cam]]))
    assert {
        (0, 0, 0),
        tuple(round(0.55 * c) for c in YELLOW),
        tuple(round(0.55 * c) for c in VIOLET),
    } <= found


@pytest.mark.parametrize(("words", "tokens"), [([], [(4, 3), (0, 0)]), (["--token", "1", "2"], [[1, 2]])])
def test_reach_starts_from_the_centre_and_a_corner_or_the_token(words, tokens, monkeypatch, tmp_path):
    given = []

    def draw(*arguments):
        given.extend(arguments[-1])
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr(drawing, "draw_reach", draw)
    sizes = ["--size", "8", "6", "--window", "2", "--blocks", "1"]
    reach.main([*sizes, *words, "--output", str(tmp_path / "out.png")])
    assert given == tokens


def test_a_model_is_initialised_alike_each_time_and_evaluates():
    one, two = (visualise.build_model("resnet10t", None, None) for _ in range(2))
    assert not one.training
    assert all(value.equal(two.state_dict()[name]) for name, value in one.state_dict().items())


def test_images_are_normalised_as_the_model_was_trained(monkeypatch, tmp_path):
    seen = []

    def field(model, layer, images, **options):
        seen.append(images)
        return torch.ones(4, 6)

    monkeypatch.setattr(saliency, "effective_receptive_field", field)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (6, 4), (255, 0, 0)).save(tmp_path / "images" / "red.png")
    argv = ["--model", "resnet10t", "--layer", "layer1", "--images", str(tmp_path / "images")]
    argv += ["--size", "4", "6"]
    visualise.main([*argv, "--output", str(tmp_path / "out.png")])
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    torch.testing.assert_close(seen[0][0, :, 0, 0], expected)
