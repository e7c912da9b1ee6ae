import pytest
import torch
from accelerate import Accelerator
from torch import nn

from iwin_tasks.segmentation import ConfusionMatrix, evaluate
from iwin_tasks.segmentation.data import HeldOutPixels, open_pixels
from iwin_tasks.segmentation.evaluate import evaluate_segmenter
from iwin_tasks.segmentation.inference import InferenceOptions, predict_probabilities


class Process:
    """One of several processes, as Accelerate describes it; sums are those of this process."""

    device = torch.device("cpu")

    def __init__(self, rank, ranks):
        self.process_index, self.num_processes = rank, ranks
        self.autocast, self.reduced = Accelerator(cpu=True).autocast, 0

    def reduce(self, values, reduction):
        self.reduced += 1
        return values


@pytest.fixture(scope="module")
def model():
    """Returns an untrained network of 11 classes."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 11, 3, stride=2, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(11), nn.Upsample(scale_factor=2)).eval()


@pytest.fixture
def data(folder):
    """Returns three held-out images of two sizes, 4 to train on left out."""
    from PIL import Image

    for kind in ("images", "annotations"):
        path = folder / kind / "validation" / "00000001.png"
        with Image.open(path) as picture:
            picture.crop((0, 0, 48, 36)).save(path)
    return HeldOutPixels(open_pixels({"name": "ade20k", "path": str(folder)}, "held-out", 11), (112, 80))


def evaluated(model, data, accelerator=None, batch_size=2, **options):
    """Returns the result of one process."""
    return evaluate_segmenter(
        model, data, InferenceOptions(**options), batch_size, 11, accelerator or Accelerator(cpu=True)
    )


@pytest.mark.parametrize("options", [{}, {"flip": True, "scales": [0.5, 1.0]}, {"window": [32, 40]}])
def test_scores_are_those_of_each_image_by_itself(model, data, options):
    matrix = ConfusionMatrix(11)
    for image, labels in (data[row] for row in range(3)):
        given = {**options, "scales": options.get("scales", (1.0,))}
        shares = predict_probabilities(model, image[None], size=labels.shape, **given)
        matrix.add(shares.argmax(1)[0], labels)
    for batch_size in (1, 3):
        result = evaluated(model, data, batch_size=batch_size, **options)
        assert result.scores[:3] == pytest.approx(
            matrix.scores()[:3], abs=1e-3
        )  # of a pixel or two on an edge
    assert result.num_images == 3
    assert result.images_per_s > 0
    line = str(result)
    assert line.startswith("mIoU ")
    assert line.endswith("images/s")


def test_processes_share_the_images_and_count_each_once(model, data, monkeypatch):
    counts = []
    scores = evaluate.ConfusionMatrix.scores
    monkeypatch.setattr(
        evaluate.ConfusionMatrix, "scores", lambda self: counts.append(self.counts.clone()) or scores(self)
    )
    evaluated(model, data)
    for process in (Process(0, 2), Process(1, 2)):
        evaluated(model, data, process)
        assert process.reduced == 1
    assert counts[0].equal(counts[1] + counts[2])
    assert counts[0].sum() == 2 * 40 * 56 + 36 * 48


def test_the_mode_and_the_random_state_stay(model, data):
    state = torch.get_rng_state()
    statistics = model[1].running_mean.clone()
    for training in (True, False):
        evaluated(model.train(training), data)
        assert model.training == training
    assert statistics.equal(model[1].running_mean)
    assert state.equal(torch.get_rng_state())
