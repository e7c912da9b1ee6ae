"""Under bfloat16 a segmenter's logits, probabilities and losses are float32."""

import pytest
import torch

from iwin_tasks.segmentation import build_segmenter, predict_probabilities


def small(kind):
    torch.manual_seed(0)
    return build_segmenter(kind, "resnet10t", 5, channels=8, auxiliary_channels=4, dropout=0.0)


@pytest.mark.parametrize("kind", ["upernet", "semantic_fpn"])
def test_with_networks_in_float32_autocast_changes_no_bit(kind):
    model = small(kind)
    heads = (model.backbone, model.neck, model.decode_head, model.auxiliary_head)
    for part in filter(None, heads):
        forward = part.forward

        def computed(*given, forward=forward):
            with torch.autocast("cpu", enabled=False):
                return forward(*given)

        part.forward = computed
    images, labels = torch.rand(2, 3, 70, 90), torch.randint(5, (2, 70, 90))
    found = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            state = {name: value.clone() for name, value in model.state_dict().items()}
            losses = model.train()(images, labels)
            model.load_state_dict(state)
            found.append(losses | {"logits": model.eval()(images)})
    for name, value in found[0].items():
        assert value.dtype == torch.float32
        assert value.equal(found[1][name]), name


@pytest.mark.parametrize("kind", ["upernet", "semantic_fpn"])
def test_logits_are_enlarged_in_float32(kind):
    model = small(kind).eval()
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        coarse, logits = model.decode(images), model(images)
        assert predict_probabilities(model, images).dtype == torch.float32
    assert coarse.dtype == torch.bfloat16
    assert logits.dtype == torch.float32
    wanted = torch.nn.functional.interpolate(coarse.float(), (64, 96), mode="bilinear")
    assert logits.equal(wanted)
