import io
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from flashdit.digits.reference import DigitsSource
from flashdit.evaluation.features.cache import FeatureCache
from flashdit.evaluation.features.extractor import EXTRACTORS, FORWARD_ROWS, Extractor
from flashdit.evaluation.features.ranks import Ranks
from flashdit.evaluation.features.statistics import (
    ImageStatistics,
    Share,
    collect,
    extract,
    forward_padded,
    regrouped,
)
from flashdit.evaluation.images.sources import GeneratedSource, open_source
from flashdit.evaluation.metrics.metric import METRICS
from flashdit.evaluation.metrics.scoring import compute_scores
from flashdit.sampling.checkpoint import load_generator
from flashdit.sampling.options import SamplingOptions
from flashdit.shared import progress

EXTRACTOR = EXTRACTORS.build("digits").eval()
PARTS = {"moments", "spatial", "pool", "logits"}
FIELDS = ("mu", "sigma", "mu_s", "sigma_s", "pool", "logits")


class Digits(DigitsSource):
    """Some of the held-out digits; counts how often it is read."""

    def __init__(self, count: int):
        super().__init__("held-out")
        self.images, self.labels, self.count = self.images[:count], self.labels[:count], count
        self.readings = 0

    def batches(self, batch_size, ids=None):
        self.readings += 1
        return super().batches(batch_size, ids)


class PoolOnly(Extractor):
    """An extractor without spatial features and logits."""

    name = "mean"
    pool_dimensions = 3

    def forward(self, images):
        return {"pool": images.float().mean((2, 3))}


def assert_same(first: ImageStatistics, second: ImageStatistics, **tolerance):
    for field in FIELDS:
        assert_close(getattr(first, field), getattr(second, field), **tolerance, msg=field)


@pytest.mark.parametrize("batch_size", [1, 7, 90])
def test_every_batch_size_gives_the_same_bits(batch_size):
    first, second = (collect(Digits(90), EXTRACTOR, PARTS, size) for size in (batch_size, 40))
    assert_same(first, second, rtol=0, atol=0)


def test_the_bar_advances_while_a_batch_is_drawn(tiny_checkpoint, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "tqdm", partial(progress.tqdm, mininterval=0))
    generator = load_generator(tiny_checkpoint)
    source = GeneratedSource(generator, torch.zeros(5).long(), SamplingOptions(steps=5))
    collect(source, PoolOnly(), ["pool"], 100)
    counts = re.findall(r"(\d)/5", terminal.getvalue())
    assert list(dict.fromkeys(counts)) == list("012345")
    assert counts == sorted(counts)
    assert generator.on_progress is None


@pytest.mark.parametrize("world", [2, 3, 4])
def test_shares_of_processes_make_the_whole(world):
    whole = collect(Digits(3), EXTRACTOR, PARTS, 2)
    source = Digits(3)  # of four processes one has nothing to do

    class Simulated(Ranks):
        def from_others(self, value):
            for rank in range(1, world):
                share = Share(PARTS, "cpu")
                ids = Ranks(rank, world).share(source.count)
                for images in source.batches(2, ids):
                    share.add(forward_padded(EXTRACTOR, images, "cpu"))
                yield (
                    share.moments.get(self.part)
                    if self.part in ("moments", "spatial")
                    else (torch.cat(share.rows[self.part]) if self.part in share.rows else None)
                )

    found = {}
    for part in PARTS:
        ranks = Simulated(0, world)
        ranks.part = part
        found |= extract(source, EXTRACTOR, [part], 2, "cpu", ranks)[part]
    assert_same(ImageStatistics(name="", count=3, **found), whole, rtol=1e-9, atol=1e-12)


def test_ranks_share_every_image_once():
    shares = [Ranks(rank, 3).share(11).tolist() for rank in range(3)]
    assert sorted(row for share in shares for row in share) == list(range(11))
    assert shares[1] == [1, 4, 7, 10]


def test_one_process_agrees_with_itself():
    with pytest.raises(KeyError, match="seen"), Ranks().agree():
        raise KeyError("seen")
    assert Ranks().broadcast(5) == 5
    assert list(Ranks().from_others(5)) == []


@pytest.mark.parametrize("sizes", [[1, 5, 2], [4, 4], [3], [13], []])
def test_regrouping_keeps_every_image_in_order(sizes):
    images = torch.arange(sum(sizes))
    groups = list(regrouped(images.split(sizes), 4))
    assert all(len(group) == 4 for group in groups[:-1])
    assert torch.cat([images[:0], *groups]).tolist() == images.tolist()


def test_npz_and_folder_of_the_same_images_give_the_same_bits(tmp_path):
    images = Digits(20).images.permute(0, 2, 3, 1).contiguous().numpy()
    np.savez(tmp_path / "images.npz", images)
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{number}.png")
    first, second = (
        collect(open_source(tmp_path / name), EXTRACTOR, PARTS, 7) for name in ("images.npz", "folder")
    )
    assert_same(first, second, rtol=0, atol=0)


def test_an_extractor_without_spatial_features_leaves_them_out_with_a_reason(cache_folder):
    cache = FeatureCache()
    for _ in range(2):  # the second time from the cache
        samples = collect(Digits(9), PoolOnly(), PARTS, 4, cache=cache)
        assert samples.mu_s is None
        assert samples.logits is None
        scores = compute_scores(["fid", "sfid", "is"], samples, samples)
        assert scores.values == pytest.approx({"fid": 0.0, "sfid": None, "is_mean": None, "is_std": None})
        assert scores.reasons["sfid"] == "the extractor has no spatial features"


def test_scores_of_fewer_images_than_dimensions_are_finite():
    few, others = (collect(Digits(count), EXTRACTOR, PARTS, 8) for count in (9, 30))
    scores = compute_scores(METRICS.names(), few, others)
    assert {key for key, value in scores.values.items() if value is None} == {"is_std"}  # of one chunk
    assert scores.values["fid"] > 0


def test_one_image_is_refused():
    with pytest.raises(ValueError, match="a covariance needs at least 2 images, got 1 in 'digits held-out'"):
        collect(Digits(1), EXTRACTOR, {"moments"}, 4)


def test_a_forward_always_has_the_same_number_of_images():
    seen = []

    class Watching(PoolOnly):
        def forward(self, images):
            seen.append(len(images))
            return super().forward(images)

    collect(Digits(FORWARD_ROWS + 3), Watching(), {"pool"}, 10)
    assert seen == [FORWARD_ROWS, FORWARD_ROWS]
