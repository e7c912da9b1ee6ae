"""What the digits classifier's features are of its maps."""

import torch
from torch.testing import assert_close

from flashdit.digits.classifier import load_digits_classifier
from flashdit.digits.images import digits


def test_features_are_the_first_channels_before_and_the_mean_after_the_last_stage():
    classifier, maps = load_digits_classifier(), {}
    *_, last = classifier.backbone.stages()
    last.register_forward_hook(lambda module, inputs, output: maps.update(before=inputs[0], after=output))
    with torch.no_grad():
        features = classifier(digits("held-out")[0][:3])
    assert maps["before"].shape == (3, 4, 4, 64)
    assert_close(features["spatial"], maps["before"][..., :7].flatten(1))
    assert_close(features["pool"], classifier.backbone.norm(maps["after"]).mean((1, 2)))
    assert_close(features["logits"], classifier.backbone.head(features["pool"]))
