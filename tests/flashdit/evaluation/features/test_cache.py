"""What is kept is found again, and nothing else is."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from flashdit.evaluation.features import statistics
from flashdit.evaluation.features.cache import FeatureCache, default_folder
from flashdit.evaluation.features.extractor import EXTRACTORS
from flashdit.evaluation.features.statistics import collect
from flashdit.evaluation.images.sources import open_source

PARTS = {"moments", "pool"}


@pytest.fixture
def extractor():
    return EXTRACTORS.build("digits").eval()


@pytest.fixture
def extractions(monkeypatch) -> list[set[str]]:
    """Returns the list of what has been extracted and not found."""
    made, real = [], statistics.extract

    def counting(source, extractor, parts, *how):
        made.append(set(parts))
        return real(source, extractor, parts, *how)

    monkeypatch.setattr(statistics, "extract", counting)
    return made


def images(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (6, 8, 12, 3), dtype=np.uint8)


def write_folder(path: Path, seed: int) -> Path:
    path.mkdir(exist_ok=True)
    for number, image in enumerate(images(seed)):
        Image.fromarray(image).save(path / f"{number}.bmp")  # every file as long as any other
    return path


def test_what_is_kept_is_found_again_to_the_bit(tmp_path, extractor, extractions):
    np.savez(tmp_path / "s.npz", images(0))
    first, second = (
        collect(open_source(tmp_path / "s.npz"), extractor, PARTS, 4, cache=FeatureCache()) for _ in range(2)
    )
    assert extractions == [PARTS]
    for field in ("mu", "sigma", "pool"):
        assert_close(getattr(first, field), getattr(second, field), rtol=0, atol=0)
    assert not list(default_folder().rglob(".*"))


def test_only_what_is_missing_is_extracted(tmp_path, extractor, extractions):
    np.savez(tmp_path / "s.npz", images(0))
    for parts in ({"pool"}, {"pool", "logits"}, {"logits"}):
        collect(open_source(tmp_path / "s.npz"), extractor, parts, 4, cache=FeatureCache())
    assert extractions == [{"pool"}, {"logits"}]


def test_other_images_under_the_same_name_are_not_the_old_ones(tmp_path, extractor, extractions):
    for seed in (0, 1):
        np.savez(tmp_path / "s.npz", images(seed))
        found = collect(open_source(tmp_path / "s.npz"), extractor, PARTS, 4, cache=FeatureCache())
        fresh = collect(open_source(tmp_path / "s.npz"), extractor, PARTS, 4)
        assert_close(found.pool, fresh.pool, rtol=0, atol=0)
    assert len(extractions) == 4


def test_a_changed_file_of_a_folder_is_seen(tmp_path, extractor, extractions):
    folder = write_folder(tmp_path / "images", 0)
    collect(open_source(folder), extractor, PARTS, 4, cache=FeatureCache())
    about = (folder / "3.bmp").stat()
    Image.fromarray(images(1)[3]).save(folder / "3.bmp")
    assert (folder / "3.bmp").stat().st_size == about.st_size
    os.utime(folder / "3.bmp", ns=(about.st_atime_ns, about.st_mtime_ns))
    collect(open_source(folder), extractor, PARTS, 4, cache=FeatureCache())
    assert extractions == [PARTS, PARTS]


def test_other_weights_and_another_number_of_images_are_kept_apart(tmp_path, extractor, extractions):
    np.savez(tmp_path / "s.npz", images(0))
    collect(open_source(tmp_path / "s.npz"), extractor, PARTS, 4, cache=FeatureCache())
    few = collect(open_source(tmp_path / "s.npz", limit=5), extractor, PARTS, 4, cache=FeatureCache())
    assert len(few.pool) == 5
    with torch.no_grad():
        next(extractor.parameters()).view(-1)[0].add_(1e-3)
    collect(open_source(tmp_path / "s.npz"), extractor, PARTS, 4, cache=FeatureCache())
    assert extractions == [PARTS] * 3


def cut(content: bytes) -> bytes:
    return content[:40]


def flip(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


@pytest.mark.parametrize("damage", [cut, flip])
def test_a_damaged_file_is_made_again(tmp_path, extractor, extractions, caplog, damage):
    np.savez(tmp_path / "s.npz", images(0))
    collect(open_source(tmp_path / "s.npz"), extractor, {"pool"}, 4, cache=FeatureCache())
    (kept,) = default_folder().rglob("*.safetensors")
    kept.write_bytes(damage(kept.read_bytes()))
    again = collect(open_source(tmp_path / "s.npz"), extractor, {"pool"}, 4, cache=FeatureCache())
    assert len(again.pool) == 6
    assert len(extractions) == 2
    assert "cannot be read and are made again" in caplog.text


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path, extractor, caplog):
    np.savez(tmp_path / "s.npz", images(0))
    (tmp_path / "file").write_text("no folder")
    cache = FeatureCache(tmp_path / "file" / "cache")
    assert len(collect(open_source(tmp_path / "s.npz"), extractor, {"pool"}, 4, cache=cache).pool) == 6
    assert "features cannot be kept in" in caplog.text


def test_default_folder_is_the_variables_or_below_home(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHDIT_CACHE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
    monkeypatch.delenv("FLASHDIT_CACHE")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert default_folder() == tmp_path / ".cache" / "flashdit" / "features"


def test_what_was_used_longest_ago_goes_once_the_cache_is_full(tmp_path, monkeypatch):
    one = {"pool": torch.zeros(1000)}  # 4,000 bytes and a header
    monkeypatch.setenv("FLASHDIT_CACHE_GB", str(13_000 / 1e9))
    cache = FeatureCache(tmp_path / "cache")
    for age, key in enumerate("abc"):
        cache.write(key * 64, "pool", one)
        os.utime(cache._path(key * 64, "pool"), (1000 + age, 1000 + age))
    assert cache.read("a" * 64, "pool") is not None  # now used last
    cache.write("d" * 64, "pool", one)
    assert [key for key in "abcd" if cache.read(key * 64, "pool") is not None] == ["a", "c", "d"]
    assert sorted(path.name[0] for path in (tmp_path / "cache").glob("*/*")) == ["a", "c", "d"]


def test_a_cache_of_size_0_keeps_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHDIT_CACHE_GB", "0")
    cache = FeatureCache(tmp_path)
    cache.write("a" * 64, "pool", {"pool": torch.zeros(3)})
    assert cache.read("a" * 64, "pool") is None


@pytest.mark.parametrize("given", ["-1", "much", "nan"])
def test_a_size_that_is_none_is_named(monkeypatch, given):
    monkeypatch.setenv("FLASHDIT_CACHE_GB", given)
    with pytest.raises(ValueError, match=f"FLASHDIT_CACHE_GB must be a number of gigabytes.* got '{given}'"):
        FeatureCache()


def test_what_others_keep_in_the_folder_is_never_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHDIT_CACHE_GB", "0")
    for name in ("run/ema_snapshots/step_00000001_std0.050", "ab/models/w", f"ab/{'c' * 64}/w"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / f"{name}.safetensors").write_bytes(b"of the user's")
    before = sorted(tmp_path.rglob("*"))
    cache = FeatureCache(tmp_path)
    cache.write("a" * 64, "pool", {"pool": torch.zeros(3)})
    assert cache.read("a" * 64, "pool") is None
    assert [path for path in before if not path.exists()] == []
