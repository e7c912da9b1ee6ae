"""Extractors by name: torch-fidelity's, and those of the user's own."""

import sys
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from flashdit.digits.reference import DigitsSource
from flashdit.evaluation.features.extractor import Extractor
from flashdit.evaluation.features.extractors import build_extractor
from flashdit.evaluation.features.statistics import collect
from flashdit.evaluation.metrics.metric import METRICS
from flashdit.evaluation.metrics.scoring import score_names


class Tiny(FeatureExtractorBase):
    """A network as torch-fidelity knows them, with weights by path."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **options):
        super().__init__(name, features_list)
        self.linear = torch.nn.Linear(3, 5)
        torch.nn.init.constant_(self.linear.weight, 0.5)
        torch.nn.init.zeros_(self.linear.bias)
        if feature_extractor_weights_path:
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    @staticmethod
    def get_provided_features_list():
        return "pooled", "classes"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "classes" if metric == "isc" else "pooled"

    def forward(self, images):
        pooled = images.float().mean((2, 3))
        layers = {"pooled": pooled, "classes": self.linear(pooled)}
        return tuple(layers[name] for name in self.features_list)


class OneLayer(Tiny):
    """Where torch-fidelity takes one layer for every score."""

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "pooled"


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "tiny", Tiny)
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "one-layer", OneLayer)


@pytest.fixture
def own(monkeypatch) -> ModuleType:
    """A module of the user's."""
    module = ModuleType("my_features")
    monkeypatch.setitem(sys.modules, "my_features", module)
    return module


class Mean(Extractor):
    """Colours."""

    def forward(self, images):
        return {"pool": images.float().mean((2, 3)), "spatial": images[:, 0, :2, :2].flatten(1).float()}


def test_any_registered_name_of_torch_fidelitys_gives_its_layers():
    extractor = build_extractor("tiny")
    assert extractor.pool_dimensions == 3
    assert extractor.spatial_dimensions == 0
    found = collect(DigitsSource("held-out"), extractor, {"moments", "spatial", "logits"}, 100)
    assert found.mu_s is None
    assert found.logits is not None
    assert found.logits.shape == (360, 5)


def test_one_layer_for_every_score_is_no_logits():
    assert build_extractor("one-layer")(torch.zeros(2, 3, 4, 6, dtype=torch.uint8))["logits"] is None


def test_its_weights_are_read_and_hashed(tmp_path):
    weights = Tiny("tiny", ["pooled"]).state_dict()
    weights["linear.weight"].fill_(0.25)
    torch.save(weights, tmp_path / "tiny.pth")
    extractor = build_extractor("tiny", str(tmp_path / "tiny.pth"))
    assert extractor.fingerprint != build_extractor("tiny").fingerprint
    assert len(str(extractor.weights_sha256)) == 64
    torch.save({"other": torch.zeros(1)}, tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match=r"must be those of extractor 'tiny', got .*tiny\.pth: Error"):
        build_extractor("tiny", str(tmp_path / "tiny.pth"))
    (tmp_path / "tiny.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"weights must be a readable torch .* file, .*tiny\.pth is not"):
        build_extractor("tiny", str(tmp_path / "tiny.pth"))


def test_a_callable_of_the_users_gives_an_extractor_that_is_never_called_fid(own):
    own.mean = Mean
    extractor = build_extractor("my_features:mean")
    assert (extractor.name, extractor.pool_dimensions, extractor.spatial_dimensions) == (
        "my_features:mean",
        3,
        4,
    )
    names = score_names(METRICS.names(), extractor)
    assert {name.stem for name in names.values()}.isdisjoint({"fid", "sfid", "kid"})
    assert names["fid"][:2] == ("fd", "FD[my_features:mean]")


def test_inception_v3_compat_is_the_same_as_inception(inception_weights):
    assert build_extractor("inception-v3-compat", str(inception_weights)).is_inception


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "vgg16",
            r"extractor 'vgg16' needs its weights, .* no file .*checkpoints/vgg16-397923af\.pth; nothing",
        ),
        ("clip-vit-b-32", r"no file .*clip-vit-b-32-40d3.*\.pt; nothing is downloaded"),
        ("dinov2-vit-s-14", r"read from torch hub's cache alone .* got no .*facebookresearch_dinov2_main"),
        ("vgg61", "unknown extractor 'vgg61'; did you mean 'vgg16'"),
        ("nowhere:at_all", "'package.module:callable' must import, got nowhere:at_all: No module"),
        ("my_features:absent", "must import, got my_features:absent: module 'my_features' has no attribute"),
        ("my_features:thing", r"must return a flashdit.evaluation.features.Extractor, got int"),
    ],
)
def test_what_cannot_be_had_is_refused_and_never_downloaded(name, message, own, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    own.thing = lambda: 5
    with pytest.raises(ValueError, match=message):
        build_extractor(name)


def test_weights_for_the_digits_are_refused():
    with pytest.raises(ValueError, match="unknown option of extractor 'digits' 'weights'"):
        build_extractor("digits", "some.pth")


BLACK = torch.zeros(32, 4)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (None, "must map uint8 .* to a mapping with 'pool', got NoneType"),
        ({"logits": BLACK}, r"to a mapping with 'pool', got \['logits'\]"),
        ({"pool": BLACK[0]}, r"to pool \(n, width\), got \(4,\) for n = 32"),
        ({"pool": BLACK[:3]}, r"to pool \(n, width\), got \(3, 4\) for n = 32"),
        ({"pool": [1]}, r"to pool \(n, width\), got list"),
        ({"pool": BLACK.double()}, r"to finite float32 pool, got torch\.float64"),
        ({"pool": BLACK / 0}, r"to finite float32 pool"),
        ({"pool": BLACK, "spatial": BLACK[0]}, r"to spatial \(n, width\)"),
    ],
)
def test_features_that_are_none_are_one_sentence(own, features, message):
    class Wrong(Extractor):
        def forward(self, images):
            return features

    own.wrong = Wrong
    with pytest.raises(ValueError, match=message):
        build_extractor("my_features:wrong")


def test_an_extractor_that_fails_is_one_sentence(own):
    class Fails(Extractor):
        def forward(self, images):
            raise KeyError("weights")

    own.fails, own.needs = Fails, lambda path: path
    with pytest.raises(ValueError, match=r"extractor 'my_features:fails' .* it fails: KeyError: 'weights'"):
        build_extractor("my_features:fails")
    with pytest.raises(ValueError, match="must be made without arguments, my_features:needs is not: TypeErr"):
        build_extractor("my_features:needs")


def test_an_extractors_statements_must_be_true(own):
    class Wide(Mean):
        pool_dimensions = 7

    class Named(Mean):
        class_names: ClassVar = ["one", "two"]

    own.wide, own.named = Wide, Named
    with pytest.raises(ValueError, match="must have its pool_dimensions=7, got 3"):
        build_extractor("my_features:wide")
    with pytest.raises(ValueError, match="one logit for each of its 2 class_names, got None"):
        build_extractor("my_features:named")
