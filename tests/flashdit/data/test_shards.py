import copy

import pytest
import torch
from safetensors.torch import load_file

from flashdit.data.shards import LatentShards, write_shard


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


def test_a_worker_process_opens_its_own_files(tiny_shards):
    shards = LatentShards(tiny_shards)
    copied = copy.deepcopy(shards)
    assert copied.files == {}
    assert copied.latent(25).equal(shards.latent(25))


def test_statistics_come_from_the_file_or_from_a_sample(tiny_shards):
    mean, std = LatentShards(tiny_shards).statistics() or pytest.fail("no statistics")
    assert (mean.flatten().tolist(), std.flatten().tolist()) == ([2.0] * 3, [3.0] * 3)
    (tiny_shards / "latents_stats.pt").unlink()
    assert LatentShards(tiny_shards).statistics() is None
    assert LatentShards(tiny_shards).sample().shape == (37, 3, 8, 8)


def test_class_names_beside_the_shards_are_read(tiny_shards):
    (tiny_shards / "class_names.json").write_text('["cat", "dog", "cow", "hen"]')
    shards = LatentShards(tiny_shards)
    assert shards.class_names == ["cat", "dog", "cow", "hen"]
    assert shards.num_classes == 4


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
