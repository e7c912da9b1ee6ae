"""Images as latents in memory and for shards: mirrors, posterior noise, and images that cannot be read."""

import numpy as np
import pytest
import torch
from PIL import Image

from flashdit.data.autoencoders import load_vae
from flashdit.data.encode import MirrorEncoder, open_latents
from flashdit.data.inspection import ReadableImages
from flashdit.data.latents import LatentOptions
from flashdit.data.sources import CroppedImage

CPU = torch.device("cpu")


@pytest.fixture
def pictures(tmp_path):
    """Returns a folder of three pictures in two classes, and their pixels (3, 3, 8, 8)."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    for name, image in zip(("a/0.png", "b/1.png", "b/2.png"), pixels, strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / name)
    return tmp_path, torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_latents_in_memory_are_those_of_the_images_and_of_their_mirrors(pictures):
    folder, pixels = pictures
    spec = {"name": "images", "path": str(folder), "image_size": 8}
    data, space = open_latents(spec, LatentOptions(vae="digits"), CPU, progress=False)
    assert data.labels.tolist() == [0, 1, 1]
    rows = torch.arange(3)
    for mirrored, images in ((False, pixels), (True, pixels.flip(-1))):
        found = data.read(rows, torch.full((3,), mirrored))
        torch.testing.assert_close(found, space.vae.encode(images))
    plain, _ = open_latents(spec | {"mirrors": False}, LatentOptions(vae="digits"), CPU, progress=False)
    assert plain.mirrored is None


def test_every_image_and_its_mirror_have_posterior_noise_of_their_own():
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)  # of mirrored images the means are equal
    encoder = MirrorEncoder(load_vae("digits"), CPU, "fp32", "float32", seed=3)
    latents = encoder(images, [4, 9]).flatten(0, 1).flatten(1)
    assert torch.cdist(latents, latents)[~torch.eye(4, dtype=torch.bool)].min() > 0
    torch.testing.assert_close(encoder(images[:1], [9])[:, 0], encoder(images, [4, 9])[:, 1])
    means = MirrorEncoder(load_vae("digits"), CPU, "fp32", "float32", seed=None)(images, [4, 9])
    assert means[0].equal(means[1])


class Broken:
    """A source whose second image is broken, or too large for the memory."""

    def __init__(self, error):
        self.error = error

    def read(self, row):
        if row == 1:
            raise self.error
        return CroppedImage(torch.full((3, 2, 2), row), 5 + row, row == 2, animated=row == 0)


def test_a_broken_image_is_left_out_and_named_but_a_full_memory_ends_the_reading():
    read = ReadableImages(Broken(ValueError("not a PNG file")))[range(3)]
    assert (read.rows, read.unreadable) == ([0, 2], {1: "not a PNG file"})
    assert (read.short_sides, read.transparent, read.animated) == ([5, 7], 1, 1)
    assert read.images[:, 0, 0, 0].tolist() == [0, 2]
    with pytest.raises(MemoryError):
        ReadableImages(Broken(MemoryError()))[range(3)]
