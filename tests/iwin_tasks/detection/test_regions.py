import torch

from iwin_tasks.detection.regions import AlignedPooler, mask_targets, paste_mask, paste_masks, pyramid_level


def test_a_box_goes_to_the_map_of_its_size():
    sides = torch.tensor([1.0, 111.99, 112.0, 223.9, 224.0, 448.0, 5000.0])
    boxes = torch.stack([sides * 0, sides * 0, sides * 4, sides / 4], dim=1)
    assert pyramid_level(boxes, 4).tolist() == [0, 0, 1, 1, 2, 3, 3]


def test_pooling_a_ramp_gives_the_pixel_coordinates_of_the_box():
    x = (torch.arange(60) + 0.5).expand(2, 1, 40, 60) * 4  # the middle of each point of a map of stride 4
    maps = {"0": x + torch.tensor([0.0, 1000.0]).view(2, 1, 1, 1), "1": torch.zeros(2, 1, 20, 30)}
    boxes = [torch.tensor([[20.0, 10.0, 48.0, 66.0]]), torch.tensor([[40.0, 20.0, 68.0, 48.0]])]
    pooled = AlignedPooler((4, 8), 7)(maps, boxes)
    torch.testing.assert_close(pooled[0, 0, 3], 20 + 4 * (torch.arange(7) + 0.5))
    torch.testing.assert_close(pooled[1, 0, 3], 1040 + 4 * (torch.arange(7) + 0.5))


def test_mask_targets_are_the_mask_in_the_box_at_pixel_centres():
    masks = torch.zeros(2, 30, 50, dtype=torch.uint8)
    masks[1, 10:20, 12:26] = 1
    boxes = torch.tensor([[5.0, 3.0, 33.0, 31.0], [12.0, 10.0, 26.0, 20.0]])
    targets = mask_targets(masks, boxes, torch.tensor([1, 0]), 28)
    assert targets[0].equal(torch.nn.functional.pad(masks[1], (0, 0, 0, 1))[3:31, 5:33].float())
    assert not targets[1].any()
    assert mask_targets(masks[:0], boxes[:0], torch.zeros(0, dtype=torch.int64), 28).shape == (0, 28, 28)


def test_pasting_undoes_cutting_out():
    mask = (torch.rand(28, 28, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    pasted = paste_mask(mask, torch.tensor([5.0, 3.0, 33.0, 31.0]), (40, 50))
    assert pasted[3:31, 5:33].equal(mask.bool())
    pasted[3:31, 5:33] = False
    assert not pasted.any()


def test_a_mask_that_leaves_the_image_is_cut_off():
    ones = torch.ones(3, 28, 28)
    boxes = torch.tensor([[-10.0, -5.0, 8.0, 6.0], [30.0, 20.0, 90.0, 70.0], [60.0, 3.0, 70.0, 9.0]])
    areas = paste_masks(ones, boxes, (40, 50)).sum(dim=(1, 2)).tolist()
    assert areas == [8 * 6, 20 * 20, 0]
    assert paste_masks(ones[:0], boxes[:0], (40, 50)).shape == (0, 40, 50)
