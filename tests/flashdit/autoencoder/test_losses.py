"""Are the terms of an autoencoder's loss what their formulas say?"""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import vgg16

from flashdit.autoencoder.losses import PerceptualError, kl_per_number, pixel_error, psnr


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    network = vgg16(weights=None)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(network.state_dict(), path)
    return network, path


def test_the_divergence_is_that_of_torchs_normal_distributions():
    mean, log_variance = torch.randn(2, 2, 3, 4, 4).unbind(0)
    normal = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    expected = torch.distributions.kl_divergence(normal, standard).mean()
    torch.testing.assert_close(kl_per_number(mean, log_variance), expected)


@pytest.mark.parametrize(("kind", "error"), [("l1", 0.5), ("l2", 0.25)])
def test_the_error_of_pixels_is_absolute_or_squared(kind, error):
    images = torch.zeros(2, 3, 4, 4)
    assert pixel_error(images, images - 0.5, kind).item() == pytest.approx(error)


def test_psnr_of_a_known_error():
    images = torch.zeros(2, 3, 4, 5)
    assert psnr(images, images + 0.2) == pytest.approx(20.0, abs=1e-4)  # 0.2 of a range of 2
    assert psnr(images, images) == math.inf


def test_the_perceptual_error_is_of_unit_features_after_five_layers_of_vgg16(weights):
    network, path = weights
    images, others = torch.rand(2, 2, 3, 32, 32).mul(2).sub(1).unbind(0)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def features(x):
        x = ((x + 1) / 2 - mean[:, None, None]) / std[:, None, None]
        for number, layer in enumerate(network.features):
            x = layer(x.clone())
            if number in (3, 8, 15, 22, 29):  # the ReLU before each pooling
                yield F.normalize(x, dim=1)

    with torch.no_grad():
        pairs = zip(features(images), features(others), strict=True)
        expected = torch.stack([(a - b).square().sum(1).mean() for a, b in pairs]).mean()
        given = PerceptualError(str(path))(images, others)
    torch.testing.assert_close(given, expected)
    assert given > 0


def test_the_perceptual_error_moves_reconstructions_and_not_vgg16(weights):
    error = PerceptualError(str(weights[1]))
    reconstruction = torch.zeros(1, 3, 32, 32, requires_grad=True)
    error(torch.ones(1, 3, 32, 32), reconstruction).backward()
    assert reconstruction.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in error.parameters())


def test_other_weights_than_vgg16s_are_refused_by_name(tmp_path):
    torch.save({"features.0.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"loss\.vgg16 must be a file of torchvision's VGG16 .*other\.pth"):
        PerceptualError(str(tmp_path / "other.pth"))
