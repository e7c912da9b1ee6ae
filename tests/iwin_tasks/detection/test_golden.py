"""The authors' boxes, scores, labels, masks and losses, by their weights."""

import pytest
import torch
from golden_rule import assert_summary

from iwin_core import load_official_checkpoint
from tests.iwin_tasks.detection.conftest import META, golden_canvas, golden_detector

CASES = [f"{kind}_{case}" for kind in ("mask", "cascade") for case in "ab"]


def close(ours, theirs, limit):
    torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=0, atol=limit)


def nearest(boxes, others, labels=None, other_labels=None):
    """Returns which of the others is nearest to each box of the same label, each taken once."""
    distance = (torch.as_tensor(boxes)[:, None] - others).abs().amax(dim=-1)
    if labels is not None:
        distance = distance + 1e6 * (torch.as_tensor(labels)[:, None] != other_labels)
    found = distance.argmin(dim=1)
    assert len(found.unique()) == len(found)
    return found


def assert_detections(ours, golden, name):
    found = nearest(golden[f"{name}/boxes"], ours["boxes"], golden[f"{name}/labels"], ours["labels"])
    assert len(ours["boxes"]) == len(golden[f"{name}/boxes"])
    close(ours["boxes"][found], golden[f"{name}/boxes"], 1e-3)
    close(ours["scores"][found], golden[f"{name}/scores"], 3e-5)
    assert ours["labels"][found].equal(torch.from_numpy(golden[f"{name}/labels"]))
    return found


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_detections_equal_the_authors(name, loaded, golden):
    model, case = loaded(name.split("_")[0]), META["cases"][name]
    canvas = golden_canvas(case["seed"], case["image_hw"], case["padded_hw"])
    features = model.backbone(canvas.tensors)
    for level, (m, logits, offsets) in enumerate(
        zip(features.values(), *model.rpn.head(list(features.values())), strict=True)
    ):
        assert_summary(m, golden, f"{name}/fpn{level}")
        assert_summary(logits, golden, f"{name}/rpn_cls{level}")
        assert_summary(offsets, golden, f"{name}/rpn_reg{level}")
    (proposals,), _ = model.rpn(canvas, features)
    best = golden[f"{name}/proposals"][:, :4]
    close(proposals[nearest(best, proposals)], best, 1e-3)
    boxes = torch.from_numpy(golden[f"{name}/roi_in"])
    logits, offsets, last = model.roi_heads.forward_boxes(features, [boxes], canvas.image_sizes)
    close(logits.roll(-1, dims=1), golden[f"{name}/cls_score"], 1e-4)
    assert_summary(offsets.flatten(1), golden, f"{name}/bbox_pred")
    if "cascade" in name:
        close(last[0], golden[f"{name}/rois_last"], 1e-3)
    (ours,) = model.forward_canvas(canvas, proposals=[boxes])
    found = assert_detections(ours, golden, name)
    close(ours["masks"][found[:10]], golden[f"{name}/masks"], 5e-5)
    if case["end_to_end"]:
        assert_detections(model.forward_canvas(canvas)[0], golden, f"{name}/e2e")


@pytest.mark.parametrize(("kind", "limit"), [("mask", 1e-5), ("cascade", 3e-4)])
def test_losses_and_gradients_equal_the_authors(kind, limit, golden, monkeypatch):
    name = f"{kind}_train_a"
    case = META["train"][name]
    model, container = golden_detector(kind)
    load_official_checkpoint(model, container)
    sampler = model.rpn.fg_bg_sampler
    monkeypatch.setattr(sampler, "batch_size_per_image", 2_000_000)  # nothing is drawn at random
    counts = []
    draw = type(sampler).__call__

    def counted(self, labels):
        drawn = draw(self, labels)
        counts.append([int(kinds[0].sum()) for kinds in drawn])
        return drawn

    monkeypatch.setattr(type(sampler), "__call__", counted)
    (image,) = case["images"]
    canvas = golden_canvas(image["seed"], image["hw"], image["pad"])
    target = {key: torch.from_numpy(golden[f"{name}/gt_{key}0"]) for key in ("boxes", "labels", "masks")}
    losses = model.train().forward_canvas(canvas, [target], [torch.from_numpy(golden[f"{name}/roi_in0"])])
    assert losses.keys() == case["losses"].keys()
    for key, loss in losses.items():
        assert abs(loss.item() / golden[f"{name}/{key}"] - 1) < 1e-5, key
    assert counts == golden[f"{name}/counts"].tolist()
    sum(losses.values()).backward()
    names, _ = model.official_state({key: torch.zeros(1) for key in META["shapes"][kind]})
    own = dict(zip(META["shapes"][kind], names, strict=True))
    gradients = [model.get_parameter(own[key]).grad for key in case["grad_keys"]]
    norms = torch.tensor([0.0 if g is None else g.norm() for g in gradients], dtype=torch.float64)
    wanted = torch.from_numpy(golden[f"{name}/grad_l2"])
    assert (norms - wanted).abs().max() < limit * wanted.max()
    for stage in range(3 if kind == "cascade" else 0):
        norm = model.roi_heads.box_head[stage][0][1]
        assert_summary(norm.running_mean, golden, f"{name}/running_mean_stage{stage}")
        assert_summary(norm.running_var, golden, f"{name}/running_var_stage{stage}")
