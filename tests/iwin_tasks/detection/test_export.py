"""A detector as an exported program finds what the detector itself finds."""

import io

import pytest
import torch
from torchvision.ops import boxes as box_ops

from iwin_tasks.detection.export import export_detector
from iwin_tasks.detection.regions import paste_masks
from tests.iwin_tasks.detection.conftest import Maps, small_detector

SIZE = (60, 90)


def detector(kind, threshold):
    torch.manual_seed(0)
    model = small_detector(kind, Maps()).eval()
    model.transform.min_size, model.transform.max_size = (SIZE[0],), SIZE[1]  # so that nothing is resized
    model.roi_heads.score_thresh = threshold
    return model


def images():
    draws = torch.Generator().manual_seed(1)
    return [torch.rand(3, *SIZE, generator=draws) * scale for scale in (1.0, 0.3)]


@pytest.mark.parametrize(("kind", "threshold"), [("mask", 0.0), ("cascade", 0.0), ("mask", 0.9)])
def test_a_program_that_was_saved_finds_what_the_detector_finds(kind, threshold):
    model, file, own = detector(kind, threshold), io.BytesIO(), box_ops.batched_nms
    torch.export.save(export_detector(model, *SIZE), file)
    assert box_ops.batched_nms is own, "torchvision has its own again"
    file.seek(0)
    program = torch.export.load(file).module()
    for image in images():
        with torch.no_grad():
            boxes, scores, labels, masks = program(image)
            (wanted,) = model([image])
        assert (len(wanted["boxes"]) == 0) == (threshold == 0.9)
        torch.testing.assert_close(boxes, wanted["boxes"], rtol=0, atol=1e-4)
        torch.testing.assert_close(scores, wanted["scores"], rtol=0, atol=1e-6)
        assert labels.equal(wanted["labels"])
        assert masks.shape == (len(boxes), 28, 28)
        assert (paste_masks(masks, boxes, SIZE) == wanted["masks"]).float().mean() > 0.9999 or not len(boxes)


def test_a_side_that_cannot_be_is_named():
    with pytest.raises(ValueError, match="height and width must be at least 1, got 0 and 9"):
        export_detector(detector("mask", 0.0), 0, 9)
