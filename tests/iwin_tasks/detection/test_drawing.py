import numpy as np
import torch
from PIL import Image

from iwin_tasks.detection.drawing import draw_objects, label_colour, on_one_size


def picture(found, size=(40, 60)):
    """Returns the pixels (H, W, 3) of a drawing on grey."""
    return np.asarray(draw_objects(torch.full((3, *size), 100, dtype=torch.uint8), found, ["cat", "dog"]))


def one_object(**more):
    masks = torch.zeros(1, 40, 60, dtype=torch.bool)
    masks[0, 10:20, 10:30] = True
    boxes = torch.tensor([[10.0, 10.0, 30.0, 20.0]])
    return {"boxes": boxes, "labels": torch.tensor([1]), "masks": masks, **more}


def test_small_images_are_enlarged_and_large_ones_stay():
    nothing = {name: value[:0] for name, value in one_object().items()}
    assert picture(nothing).shape == (7 * 40, 7 * 60, 3)
    assert (picture(nothing) == 100).all()
    assert picture({**nothing, "masks": torch.zeros(0, 500, 400)}, (500, 400)).shape == (500, 400, 3)


def test_box_and_mask_have_the_label_s_colour_at_their_place():
    drawn = picture(one_object(scores=torch.tensor([0.75])))
    colour = np.array(label_colour(1))
    assert (drawn[18 * 7, 25 * 7] == (100 + colour) // 2).all(), "in the mask"
    assert (drawn[14 * 7, 30 * 7] == colour).all(), "on the box's edge"
    assert (drawn[30 * 7, 40 * 7] == 100).all()


def test_labels_near_each_other_have_colours_apart():
    colours = torch.tensor([label_colour(label) for label in range(10)]).float()
    assert torch.pdist(colours).min() > 40


def test_pictures_of_several_sizes_are_put_on_one():
    wide, high = on_one_size([Image.new("RGB", (30, 10), "red"), Image.new("RGB", (20, 40), "blue")])
    assert wide.size == high.size == (30, 40)
    assert (wide.getpixel((29, 9)), wide.getpixel((0, 10))) == ((255, 0, 0), (255, 255, 255))
