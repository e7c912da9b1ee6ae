import hashlib
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from flashdit.digits.reference import DigitsSource
from flashdit.evaluation.features.extractor import EXTRACTORS
from flashdit.evaluation.features.statistics import collect
from flashdit.evaluation.images.folders import FolderSource
from flashdit.evaluation.images.npz import NpzSource
from flashdit.evaluation.reference import Reference, chosen_ids, write_reference

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


def test_an_npz_that_does_not_say_whose_features_it_has_is_doubted(tmp_path):
    np.savez(tmp_path / "adm.npz", **ADM)
    (warning,) = Reference(str(tmp_path / "adm.npz"), EXTRACTOR).warnings
    assert warning == "'adm.npz' does not say whose features it has: 'digits' is assumed"


def test_hash_of_a_reference_is_that_of_the_file_or_of_names_and_sizes(tmp_path, images):
    np.savez(tmp_path / "images.npz", images)
    (tmp_path / "folder").mkdir()
    Image.fromarray(images[0]).save(tmp_path / "folder" / "0.png")
    recipe = Reference(str(tmp_path / "images.npz"), EXTRACTOR).recipe()
    assert recipe["sha256"] == hashlib.sha256((tmp_path / "images.npz").read_bytes()).hexdigest()
    assert recipe["num_images"] == 20
    folder = Reference(str(tmp_path / "folder"), EXTRACTOR)
    assert folder.sha256 == FolderSource(tmp_path / "folder").sha256
    assert Reference("digits", EXTRACTOR).sha256 == Reference("digits", EXTRACTOR).sha256


@pytest.mark.parametrize("kept", [20, 6])
def test_a_written_reference_gives_what_its_images_give(tmp_path, images, kept):
    np.savez(tmp_path / "images.npz", images)
    source = NpzSource(tmp_path / "images.npz")
    write_reference(source, EXTRACTOR, tmp_path / "reference.npz", num_images=kept, batch_size=7)
    reference = Reference(str(tmp_path / "reference.npz"), EXTRACTOR)
    assert (reference.count, reference.image_size, reference.warnings) == (20, (32, 32), [])
    expected = Reference(str(tmp_path / "images.npz"), EXTRACTOR).statistics(PARTS, 20, "cpu")
    found = reference.statistics(PARTS, 20, "cpu")
    for key in ("mu", "sigma", "mu_s", "sigma_s"):
        assert_close(getattr(found, key), getattr(expected, key), rtol=0, atol=0)
    ids = chosen_ids(20, kept, 0)
    assert_close(found.pool, expected.pool[ids], rtol=0, atol=0)


def test_a_written_reference_has_adms_keys_in_float64(tmp_path, images):
    np.savez(tmp_path / "images.npz", images)
    write_reference(NpzSource(tmp_path / "images.npz"), EXTRACTOR, tmp_path / "reference.npz", num_images=6)
    with np.load(tmp_path / "reference.npz") as arrays:
        assert {"mu", "sigma", "mu_s", "sigma_s", "arr_0"} <= set(arrays.files)
        assert arrays["sigma_s"].shape == (SPATIAL, SPATIAL)
        assert {arrays[key].dtype for key in ("mu", "sigma", "mu_s", "sigma_s")} == {np.dtype(np.float64)}
        assert (arrays["arr_0"] == images[chosen_ids(20, 6, 0).numpy()]).all()


def test_choice_of_images_is_seeded_and_ascending():
    ids = chosen_ids(100, 10, 0)
    assert ids.tolist() == sorted(set(ids.tolist()))
    assert ids.tolist() == chosen_ids(100, 10, 0).tolist() != chosen_ids(100, 10, 1).tolist()
    assert chosen_ids(5, 10, 0).tolist() == [0, 1, 2, 3, 4]


def test_a_reference_of_other_weights_is_refused(tmp_path, images):
    np.savez(tmp_path / "images.npz", images)
    other = EXTRACTORS.build("digits").eval()
    with torch.no_grad():
        next(other.parameters()).view(-1)[0].add_(1e-3)
    write_reference(NpzSource(tmp_path / "images.npz"), other, tmp_path / "reference.npz")
    with pytest.raises(ValueError, match=r"must be of the same extractor and weights, got 'digits' \("):
        Reference(str(tmp_path / "reference.npz"), EXTRACTOR)


@pytest.mark.parametrize(
    ("about", "message"),
    [({"schema": 9}, "in schema 1, got schema 9"), ({}, r"must have all of .*, got no \['schema'\]")],
)
def test_a_file_of_another_schema_is_refused(tmp_path, about, message):
    known = {"n": 5, "extractor": "digits", "fingerprint": EXTRACTOR.fingerprint, "image_size": (32, 32)}
    np.savez(tmp_path / "reference.npz", **ADM, **known, **about)
    with pytest.raises(ValueError, match=message):
        Reference(str(tmp_path / "reference.npz"), EXTRACTOR)


def test_a_reference_without_images_is_not_written(tmp_path, images):
    np.savez(tmp_path / "images.npz", images)
    with pytest.raises(ValueError, match="a reference must keep at least 1 image, got 0"):
        write_reference(NpzSource(tmp_path / "images.npz"), EXTRACTOR, tmp_path / "r.npz", num_images=0)
    assert not (tmp_path / "r.npz").exists()


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
    with pytest.raises(
        ValueError, match="must be a data set that brings one, an existing npz or a folder, got digit"
    ):
        Reference("digit", EXTRACTOR)
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(
        ValueError, match=r"must be a data set that brings one, an npz or a folder, got .*text\.npz"
    ):
        Reference(str(tmp_path / "text.npz"), EXTRACTOR)
    with zipfile.ZipFile(tmp_path / "broken.npz", "w") as archive:
        archive.writestr("mu.npy", b"no array")
    with pytest.raises(ValueError, match=r"must be an npz of arrays, got .*broken\.npz"):
        Reference(str(tmp_path / "broken.npz"), EXTRACTOR)


def test_statistics_of_a_written_reference_are_over_as_many_images_as_it_says(tmp_path):
    source = DigitsSource("held-out")
    write_reference(source, EXTRACTOR, tmp_path / "r.npz", num_images=5)
    reference = Reference(str(tmp_path / "r.npz"), EXTRACTOR)
    statistics = reference.statistics({"moments", "pool"}, 8, "cpu")
    assert reference.count == statistics.count == 360
    assert statistics.pool is not None
    assert len(statistics.pool) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, 1, 0.5), r"sigma must be a covariance, which is symmetric, got entries 0\.5 from their mirrors"),
        ((2, 2, -0.5), "sigma must be a covariance, which has no negative variance"),
    ],
)
def test_a_matrix_that_is_no_covariance_is_refused(tmp_path, change, message):
    row, column, value = change
    stored = {key: array.copy() for key, array in ADM.items()}
    stored["sigma"][row, column] = value
    np.savez(tmp_path / "wrong.npz", **stored)
    with pytest.raises(ValueError, match=message):
        Reference(str(tmp_path / "wrong.npz"), EXTRACTOR)


def test_covariances_of_few_images_in_single_precision_are_taken(tmp_path):
    rows = np.random.default_rng(0).normal(size=(10, POOL)).astype(np.float32)
    sigma = np.cov(rows, rowvar=False).astype(np.float32)  # of rank 9 in 64 dimensions
    np.savez(tmp_path / "few.npz", mu=rows.mean(0), sigma=sigma)
    assert Reference(str(tmp_path / "few.npz"), EXTRACTOR).stored["sigma"].shape == (POOL, POOL)


@pytest.mark.parametrize("key", ["mu", "arr_0", "arr_1"])
def test_a_header_that_claims_terabytes_is_one_sentence(tmp_path, key):
    arrays = {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "mu": np.zeros(3), "arr_1": np.zeros(2, np.int64)}
    np.savez(tmp_path / "honest.npz", **arrays)
    path = tmp_path / "lying.npz"
    with zipfile.ZipFile(tmp_path / "honest.npz") as honest, zipfile.ZipFile(path, "w") as lying:
        for name in honest.namelist():
            if name != f"{key}.npy":
                lying.writestr(name, honest.read(name))
        with lying.open(f"{key}.npy", "w") as member:
            about = {"descr": "<f8", "fortran_order": False, "shape": (10**12,)}
            np.lib.format.write_array_header_1_0(member, about)
            member.write(b"12345678")
    message = rf"must have the 8,000,000,000,000 bytes of its header, {key}\.npy has 8 in .*lying\.npz"
    for opened in (lambda: Reference(str(path), EXTRACTOR), lambda: NpzSource(path)):
        with pytest.raises(ValueError, match=message):
            opened()


def test_a_written_reference_keeps_labels_and_what_they_are_called(tmp_path):
    draws = np.random.default_rng(0)
    for number, name in enumerate(["11", "2", "11", "7"]):
        path = tmp_path / "real" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    write_reference(FolderSource(tmp_path / "real"), EXTRACTOR, tmp_path / "r.npz", num_images=3)
    source = Reference(str(tmp_path / "r.npz"), EXTRACTOR).source
    assert source is not None
    names = [source.class_names[label] for label in source.labels.tolist()]
    ids = chosen_ids(4, 3, 0).tolist()
    assert names == [["11", "2", "11", "7"][row] for row in ids]


def test_a_folder_as_reference_is_cropped_and_says_so(tmp_path):
    for number in range(2):
        Image.new("RGB", (40, 50 + number)).save(tmp_path / f"{number}.png")
    reference = Reference(str(tmp_path), EXTRACTOR, image_size=32)
    assert reference.image_size == (32, 32)
    assert reference.recipe()["cropped_to"] == 32
    np.savez(tmp_path / "adm.npz", **ADM, arr_0=np.zeros((2, 64, 64, 3), np.uint8))
    with pytest.raises(ValueError, match=r"got 64×64 in .*adm\.npz for 32×32"):
        Reference(str(tmp_path / "adm.npz"), EXTRACTOR, image_size=32)
