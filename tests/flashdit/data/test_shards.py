import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flashdit.data import shards as shards_module
from flashdit.data.manifest import MANIFEST, MANIFEST_FORMAT
from flashdit.data.shards import LatentShards, write_shard


def add_manifest(folder, **changes):
    """Writes a manifest of the shards as they are."""
    paths = sorted(folder.glob("*.safetensors"))
    manifest = {
        "format": MANIFEST_FORMAT,
        "vae_identity": "abc",
        "mean": [1.0, 2.0, 3.0],
        "std": [4.0, 5.0, 6.0],
        "shards": [{"file": path.name, "bytes": path.stat().st_size, "sha256": "0"} for path in paths],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))
    return paths


def test_layout_is_lightningdits(tiny_shards):
    names = sorted(path.name for path in tiny_shards.iterdir())
    assert names == [
        "latents_rank00_shard000.safetensors",
        "latents_rank00_shard001.safetensors",
        "latents_stats.pt",
    ]
    tensors = load_file(tiny_shards / names[0])
    assert {key: tuple(value.shape) for key, value in tensors.items()} == {
        "latents": (20, 3, 8, 8),
        "latents_flip": (20, 3, 8, 8),
        "labels": (20,),
    }
    stats = torch.load(tiny_shards / "latents_stats.pt", weights_only=True)
    assert {key: tuple(value.shape) for key, value in stats.items()} == {
        "mean": (1, 3, 1, 1),
        "std": (1, 3, 1, 1),
    }


def test_every_row_comes_back_across_shards(tiny_shards):
    shards = LatentShards(tiny_shards)
    files = [load_file(path) for path in shards.paths]
    assert len(shards) == 37
    assert shards.shape == (3, 8, 8)
    assert shards.labels.equal(torch.cat([file["labels"] for file in files]))
    for mirrored, name in ((False, "latents"), (True, "latents_flip")):
        rows = torch.stack([shards.latent(i, mirrored) for i in range(37)])
        assert rows.equal(torch.cat([file[name] for file in files]))


def test_a_batch_holds_the_rows_that_were_asked_for_in_their_order(tiny_shards):
    shards = LatentShards(tiny_shards)
    indices = torch.tensor([36, 0, 20, 19, 7, 36])
    mirrored = torch.tensor([True, False, True, False, True, False])
    rows = [shards.latent(i, m) for i, m in zip(indices.tolist(), mirrored.tolist(), strict=True)]
    batch = shards.read(indices, mirrored)
    assert batch.equal(torch.stack(rows))
    batch.zero_()
    assert shards.latent(36).equal(rows[-1]), "a batch is a copy, the mapped file stays"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_of_half_precision_come_back_as_float32(tmp_path, dtype):
    latents = torch.randn(5, 3, 4, 6).to(dtype)
    write_shard(tmp_path, 0, 0, latents, -latents, torch.arange(5))
    batch = LatentShards(tmp_path).read(torch.tensor([4, 1]), torch.tensor([False, True]))
    assert batch.dtype == torch.float32
    assert batch.equal(torch.stack([latents[4], -latents[1]]).float())


def test_each_shard_is_opened_once_and_mapped(tiny_shards, monkeypatch):
    opened = []
    safe_open = shards_module.safe_open
    monkeypatch.setattr(shards_module, "safe_open", lambda *args: opened.append(args[0]) or safe_open(*args))
    shards = LatentShards(tiny_shards)
    for _ in range(3):
        shards.read(torch.arange(37), torch.arange(37) % 2 == 0)
    assert opened == shards.paths
    maps = Path("/proc/self/maps").read_text()
    assert all(str(path) in maps for path in shards.paths)


def test_a_worker_process_maps_its_own_files(tiny_shards):
    shards = LatentShards(tiny_shards)
    copied = copy.deepcopy(shards)
    assert copied.mapped == {}
    assert copied.latent(25).equal(shards.latent(25))


def test_statistics_come_from_the_file_or_from_a_sample(tiny_shards):
    mean, std = LatentShards(tiny_shards).statistics() or pytest.fail("no statistics")
    assert (mean.flatten().tolist(), std.flatten().tolist()) == ([2.0] * 3, [3.0] * 3)
    (tiny_shards / "latents_stats.pt").unlink()
    assert LatentShards(tiny_shards).statistics() is None
    assert LatentShards(tiny_shards).sample().shape == (37, 3, 8, 8)


def test_a_manifest_tells_statistics_and_the_vae(tiny_shards):
    assert LatentShards(tiny_shards).vae_identity is None
    add_manifest(tiny_shards)
    shards = LatentShards(tiny_shards)
    mean, std = shards.statistics() or pytest.fail("no statistics")
    assert mean.shape == std.shape == (1, 3, 1, 1)
    assert (mean.flatten().tolist(), std.flatten().tolist()) == ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    assert shards.vae_identity == "abc"


def test_shards_that_are_not_those_of_the_manifest_are_named(tiny_shards):
    second = add_manifest(tiny_shards)[1]
    whole = second.read_bytes()
    second.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=rf"must have the {len(whole)} bytes of manifest.json, .*shard001"):
        LatentShards(tiny_shards)
    second.unlink()
    with pytest.raises(ValueError, match=r"every shard of manifest.json must be there, .*shard001"):
        LatentShards(tiny_shards)
    second.write_bytes(whole)
    (tiny_shards / "latents_rank01_shard000.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match=r"every shard must be in manifest.json, .*rank01_shard000"):
        LatentShards(tiny_shards)


def test_a_manifest_that_cannot_be_read_is_named(tiny_shards):
    add_manifest(tiny_shards, format=2)
    with pytest.raises(ValueError, match=r"a manifest must have format 1, .*manifest.json has 2"):
        LatentShards(tiny_shards)
    (tiny_shards / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"an encoded folder must be as written, .*manifest.json is not"):
        LatentShards(tiny_shards)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"mean": 3, "std": ["1"]}, "mean, std"),
        ({"shards": [{"file": "a"}]}, "shards"),
        ({"shards": {}, "vae_identity": None}, "shards, vae_identity"),
    ],
)
def test_a_manifest_of_other_values_is_named(tiny_shards, change, named):
    add_manifest(tiny_shards, **change)
    with pytest.raises(ValueError, match=rf"as encoding writes it, .*manifest\.json has others: {named}$"):
        LatentShards(tiny_shards)


def test_statistics_of_another_number_of_channels_are_named(tiny_shards):
    add_manifest(tiny_shards, mean=[1.0])
    with pytest.raises(
        ValueError, match=r"must be of the 3 channels of the latents, .*manifest\.json .* 1 and 3"
    ):
        LatentShards(tiny_shards).statistics()


def test_class_names_beside_the_shards_are_read(tiny_shards):
    (tiny_shards / "class_names.json").write_text('["cat", "dog", "cow", "hen"]')
    shards = LatentShards(tiny_shards)
    assert shards.class_names == ["cat", "dog", "cow", "hen"]
    assert shards.num_classes == 4
    (tiny_shards / "class_names.json").write_text('["cat"')
    with pytest.raises(ValueError, match=r"a JSON list of texts, .*class_names.json is not: Exp"):
        LatentShards(tiny_shards)
    for text in ('{"0": "cat"}', "[1, 2]", "7"):
        (tiny_shards / "class_names.json").write_text(text)
        with pytest.raises(ValueError, match=r"a JSON list of texts, .*class_names.json is not$"):
            LatentShards(tiny_shards)


def test_class_names_that_are_gone_are_those_of_the_manifest(tiny_shards):
    add_manifest(tiny_shards, class_names=["cat", "dog", "cow", "hen"])
    shards = LatentShards(tiny_shards)
    assert (shards.class_names, shards.num_classes) == (["cat", "dog", "cow", "hen"], 4)


def test_what_cannot_be_read_is_named(tiny_shards, tmp_path):
    with pytest.raises(
        ValueError, match=r"data.path must hold latents_rankRR_shardSSS.safetensors, got none in"
    ):
        LatentShards(tmp_path / "absent")
    path = tiny_shards / "latents_rank00_shard001.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"readable safetensors file, .*shard001.safetensors is not"):
        LatentShards(tiny_shards)
    write_shard(tiny_shards, 0, 1, torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8), torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"parts must agree, .*shard001.safetensors has .* 3 labels"):
        LatentShards(tiny_shards)
    write_shard(tiny_shards, 0, 1, torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 4, 8), torch.zeros(2).long())
    with pytest.raises(
        ValueError, match=r"must hold latents \(3, 8, 8\), .*shard001.safetensors holds \(3, 4, 8\)"
    ):
        LatentShards(tiny_shards)
