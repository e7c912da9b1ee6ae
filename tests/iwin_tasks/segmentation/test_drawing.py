import numpy as np
import torch
from PIL import Image

from iwin_tasks.segmentation.drawing import class_colours, label_image, over_picture, side_by_side


def test_classes_of_ade20k_have_colours_of_their_own_and_class_0_is_black():
    colours = class_colours(150)
    assert (colours.shape, colours.dtype) == ((150, 3), torch.uint8)
    assert len({tuple(colour) for colour in colours.tolist()}) == 150
    assert not colours[0].any()


def test_a_label_map_lies_over_its_picture():
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    classes = torch.arange(35).reshape(5, 7) % 4
    classes[0, 0] = 255
    shown = over_picture(image, classes, 4)
    colours = class_colours(4)
    for y, x in ((1, 2), (4, 6)):
        expected = 0.4 * image[:, y, x].float() + 0.6 * colours[classes[y, x]].float()
        torch.testing.assert_close(shown[:, y, x].float(), expected.round())
    torch.testing.assert_close(shown[:, 0, 0].float(), (0.4 * image[:, 0, 0].float() + 153).round())


def test_a_row_shows_image_truth_and_prediction():
    image = torch.zeros(3, 20, 300, dtype=torch.uint8)
    truth, found = torch.zeros(2, 20, 300, dtype=torch.int64)
    found[:] = 1
    picture = np.asarray(side_by_side([(image, truth, found)] * 2, 2, "step 1"))
    colour = over_picture(image, found, 2)[:, 0, 0].numpy()
    painted = (picture == colour).all(-1)
    assert painted.sum() == 2 * 20 * 300
    assert painted[:, : picture.shape[1] // 2].sum() == 0, "predictions are on the right"
    small = side_by_side([(image[:, :, :30], truth[:, :30], found[:, :30])], 2)
    assert small.width > 3 * 90, "a side of 30 is shown as 90"


def test_a_written_map_holds_the_classes(tmp_path):
    for num_classes, mode in ((11, "P"), (300, "I;16")):
        classes = torch.arange(35).reshape(5, 7) * num_classes // 35
        label_image(classes, num_classes).save(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as picture:
            assert picture.mode == mode
            assert torch.from_numpy(np.array(picture).astype(np.int64)).equal(classes)
            if mode == "P":
                assert picture.getpalette()[3:6] == class_colours(2)[1].tolist()
