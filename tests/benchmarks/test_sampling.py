"""The baseline of `benchmarks.sampling` computes what is compared with it, and stands where that stands."""

from inspect import signature

import torch

from benchmarks.sampling import guide_always, guided_always
from flashdit.flow.guidance import guide
from flashdit.sampling import generator


def test_the_baseline_is_the_guidance_that_it_stands_for():
    assert [*signature(guide_always).parameters] == [*signature(guide).parameters]
    labels, x = torch.tensor([0, 2]), torch.randn(2, 1, 4, 4)
    seen = []

    def model(x, t, y):
        seen.append(len(x))
        return x * t.reshape(-1, 1, 1, 1) + y.reshape(-1, 1, 1, 1)

    given = (model, labels, 3, 1.5, (0.3, 1.0), None, None)
    with guided_always():
        baseline = generator.guide(*given)
    for t in (0.1, 0.6):
        torch.testing.assert_close(baseline(x, t), guide(*given)(x, t))
    assert seen == [4, 2, 4, 4], "the baseline runs both halves at every time"
    assert generator.guide is guide
