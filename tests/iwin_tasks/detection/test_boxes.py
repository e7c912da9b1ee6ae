import math

import torch
from torchvision.models.detection.image_list import ImageList

from iwin_tasks.detection.boxes import BACKGROUND, IGNORED, OffsetCoder, StrideAnchors, match


def test_anchors_are_of_8_strides_not_rounded_and_at_their_strides():
    maps = [torch.zeros(2, 1, 4, 6), torch.zeros(2, 1, 2, 3, dtype=torch.bfloat16)]
    images = ImageList(torch.zeros(2, 3, 32, 44), [(30, 40), (32, 44)])
    anchors, again = StrideAnchors((8, 16))(images, maps)
    assert anchors.equal(again)
    assert (len(anchors), anchors.dtype) == (3 * (24 + 6), torch.float32)
    sides = anchors[:, 2:] - anchors[:, :2]
    torch.testing.assert_close(sides[:3], 64 * torch.tensor([[2**0.5, 0.5**0.5], [1, 1], [0.5**0.5, 2**0.5]]))
    centres = (anchors[:, 2:] + anchors[:, :2]) / 2
    torch.testing.assert_close(centres[3 * 23], torch.tensor([40.0, 24.0]))  # not 44 // 6 = 7 apart
    torch.testing.assert_close(centres[-1], torch.tensor([32.0, 16.0]))


def test_decoding_undoes_encoding_and_sides_change_by_1000_to_16_at_most():
    coder = OffsetCoder((10.0, 10.0, 5.0, 5.0))
    boxes = torch.tensor([[3.0, 4.0, 30.0, 20.0], [900.0, 950.0, 1001.0, 1003.0]])
    others = torch.tensor([[5.0, 1.0, 19.0, 29.0], [890.0, 955.0, 1299.0, 999.0]])
    torch.testing.assert_close(coder.decode_single(coder.encode_single(others, boxes), boxes), others)
    extreme = torch.tensor([[0.0, 0.0, -1e3, 1e3]]).expand(2, 4)
    sides = coder.decode_single(extreme, boxes)[:, 2:] - coder.decode_single(extreme, boxes)[:, :2]
    factor = math.exp(math.log(1000 / 16))
    expected = (boxes[:, 2:] - boxes[:, :2]) * torch.tensor([1 / factor, factor])
    torch.testing.assert_close(sides, expected, rtol=1e-3, atol=0)


def test_boxes_keep_their_precision_where_offsets_are_bfloat16():
    boxes = torch.tensor([[1001.0, 3.0, 1299.9, 50.0]])
    offsets = torch.zeros(1, 4, dtype=torch.bfloat16)
    torch.testing.assert_close(OffsetCoder((1.0, 1.0, 1.0, 1.0)).decode_single(offsets, boxes), boxes)


def test_a_box_is_of_the_object_that_it_overlaps_most():
    iou = torch.tensor([[0.1, 0.75, 0.5, 0.2], [0.29, 0.2, 0.6, 0.8]])
    assert match(iou, 0.7, 0.3).tolist() == [BACKGROUND, 0, IGNORED, 1]
    assert match(iou, 0.6, 0.6).tolist() == [BACKGROUND, 0, 1, 1]


def test_an_object_takes_the_boxes_that_overlap_it_most_and_the_last_object_wins():
    iou = torch.tensor([[0.4, 0.9, 0.4], [0.4, 0.8, 0.1], [0.2, 0.1, 0.1]])
    assert match(iou, 0.7, 0.3, best_from=0.3).tolist() == [IGNORED, 1, IGNORED]
    iou[2, 0] = 0.35
    assert match(iou, 0.7, 0.3, best_from=0.3).tolist() == [2, 1, IGNORED]
    assert match(iou, 0.7, 0.3, best_from=0.5).tolist() == [IGNORED, 1, IGNORED]


def test_without_objects_all_is_background():
    assert match(torch.zeros(0, 3), 0.7, 0.3, best_from=0.3).tolist() == [BACKGROUND] * 3
