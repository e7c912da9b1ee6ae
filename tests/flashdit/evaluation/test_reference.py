import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from flashdit.evaluation.features import EXTRACTORS
from flashdit.evaluation.reference import Reference
from flashdit.evaluation.sources import DigitsSource
from flashdit.evaluation.statistics import collect

EXTRACTOR = EXTRACTORS.build("digits")
POOL, SPATIAL = EXTRACTOR.pool_dimensions, EXTRACTOR.spatial_dimensions
PARTS = {"moments", "spatial", "pool", "logits"}
ADM = {"mu": np.ones(POOL), "sigma": np.eye(POOL), "mu_s": np.ones(SPATIAL), "sigma_s": np.eye(SPATIAL)}


@pytest.fixture
def images() -> np.ndarray:
    source = DigitsSource("held-out")
    return source.images[:20].permute(0, 2, 3, 1).contiguous().numpy()


def test_stored_moments_are_taken_as_they_are_and_images_serve_for_neighbours_alone(tmp_path, images):
    stored = {key: value.astype(np.float32) for key, value in ADM.items()}
    np.savez(tmp_path / "adm.npz", arr_0=images, **stored)
    statistics = Reference(str(tmp_path / "adm.npz"), EXTRACTOR).statistics(PARTS, 8, "cpu")
    assert statistics.count is None
    for key, value in ADM.items():
        assert_close(getattr(statistics, key), torch.from_numpy(value))
    assert statistics.pool is not None
    assert statistics.pool.shape == (20, POOL)


def test_npz_and_folder_of_the_same_images_give_the_same_statistics(tmp_path, images):
    np.savez(tmp_path / "images.npz", images)
    (tmp_path / "folder").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{number}.png")
    first, second = (
        Reference(str(tmp_path / name), EXTRACTOR).statistics(PARTS, batch_size, "cpu")
        for name, batch_size in (("images.npz", 7), ("folder", 20))
    )
    assert first.count == second.count == 20
    for key in ("mu", "sigma", "mu_s", "sigma_s", "pool"):
        assert_close(getattr(first, key), getattr(second, key), rtol=1e-4, atol=1e-5)


def test_digits_are_the_held_out_split():
    statistics = Reference("digits", EXTRACTOR).statistics({"moments"}, 100, "cpu")
    expected = collect(DigitsSource("held-out"), EXTRACTOR, {"moments"}, 100)
    assert statistics.count == 360
    assert_close(statistics.mu, expected.mu)
    assert statistics.pool is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": ADM["mu"]}, r"mu and sigma of a reference must come together, got \['mu'\]"),
        ({"mu_s": ADM["mu_s"], "sigma_s": ADM["sigma_s"]}, "with mu_s must hold mu and sigma too"),
        ({"mu": ADM["mu"], "sigma": np.eye(3)}, r"mu must be \(d,\) and sigma \(d, d\), got shapes"),
        ({"mu": np.ones(2048), "sigma": np.eye(2048)}, "mu must have the 64 .* 'digits', got 2048"),
        ({**ADM, "mu_s": np.ones(9), "sigma_s": np.eye(9)}, "mu_s must have the 112 dimensions"),
        ({**ADM, "mu": np.full(POOL, np.nan)}, "mu of a reference must be finite"),
        ({"features": np.ones(3)}, r"must hold mu and sigma, or images in arr_0, got \['features'\]"),
    ],
)
def test_statistics_that_cannot_be_used_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "reference.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        Reference(str(tmp_path / "reference.npz"), EXTRACTOR)


def test_what_is_no_reference_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be 'digits', an existing npz or a folder, got digit"):
        Reference("digit", EXTRACTOR)
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"must be 'digits', an npz or a folder, got .*text\.npz"):
        Reference(str(tmp_path / "text.npz"), EXTRACTOR)
    with zipfile.ZipFile(tmp_path / "broken.npz", "w") as archive:
        archive.writestr("mu.npy", b"no array")
    with pytest.raises(ValueError, match=r"must be an npz of arrays, got .*broken\.npz"):
        Reference(str(tmp_path / "broken.npz"), EXTRACTOR)
