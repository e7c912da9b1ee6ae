import pytest
import torch
from accelerate import Accelerator
from torch import nn

from iwin_tasks.classification.data import HeldOutExamples, open_split
from iwin_tasks.classification.evaluate import count_correct, evaluate_classifier
from iwin_tasks.classification.model import input_format, make_model


@pytest.fixture(scope="module")
def model():
    """Returns a tiny classifier of the digits at 16×16, untrained but not silent."""
    torch.manual_seed(0)
    spec = {"name": "iwin_tiny_patch4_window7_224", "img_size": 16, "window_size": 2, "embed_dim": 8}
    model = make_model(spec | {"depths": (1, 1), "num_heads": (1, 2), "num_classes": 10})
    nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.fixture(scope="module")
def data(model):
    """Returns the held-out digits as that model takes them."""
    form = input_format(model, crop_pct=1.0)
    return HeldOutExamples(open_split({"name": "digits"}, "held-out", form.image_size, 10), form)


@torch.no_grad()
def test_accuracy_is_that_of_all_logits_at_once(model, data):
    images, labels = torch.stack([image for image, _ in data]), torch.tensor([label for _, label in data])
    logits = model(images)
    order = logits.argsort(dim=1, descending=True)
    accuracy = evaluate_classifier(model, data, batch_size=77)
    assert accuracy.top1 == (order[:, 0] == labels).double().mean()
    assert accuracy.top5 == (order[:, :5] == labels[:, None]).any(1).double().mean()
    assert 0 < accuracy.top1 < accuracy.top5 < 1
    assert accuracy.num_images == 360
    assert accuracy.images_per_s > 0


def test_rows_split_over_two_ranks_add_up_to_one(model, data):
    whole = count_correct(model, data, range(359), 50)  # an odd count: the ranks' shares differ
    parts = [count_correct(model, data, range(rank, 359, 2), 50) for rank in (0, 1)]
    assert [part[2].item() for part in parts] == [180, 179]
    assert torch.equal(parts[0] + parts[1], whole)
    assert whole[2] == 359


def test_more_processes_than_images_leave_some_without_any(model, data):
    assert count_correct(model, data, range(5, 3, 8), 50).tolist() == [0, 0, 0]


def test_with_accelerate_the_result_is_the_same_and_nothing_else_changes(model, data):
    alone = evaluate_classifier(model, data, 90)
    state = torch.get_rng_state()
    shared = evaluate_classifier(model.train(), data, 90, accelerator=Accelerator(cpu=True))
    assert model.training
    model.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert (shared.top1, shared.top5, shared.num_images) == (alone.top1, alone.top5, 360)


def test_fewer_than_five_classes_are_all_among_the_top(data):
    class Three(nn.Module):
        def forward(self, images):
            return images.mean((2, 3))

    counts = count_correct(Three(), data, range(40), 16)
    assert counts[1] == sum(label < 3 for _, label in (data[row] for row in range(40)))


@pytest.mark.parametrize(("classes", "told"), [(5, False), (6, True)])
def test_top_five_of_five_classes_is_no_score(model, data, monkeypatch, classes, told):
    monkeypatch.setattr(data.images, "class_names", data.images.class_names[:classes])
    accuracy = evaluate_classifier(model, data, 360)
    assert ("top-5 " in str(accuracy)) == told
    assert list(accuracy.scores()) == ["ema_top1", "ema_top5"][: 1 + told]


def test_accuracy_reads_as_a_line(model, data):
    line = str(evaluate_classifier(model, data, 360))
    assert line.startswith("top-1 ")
    assert "  360 images  " in line
    assert line.endswith(" images/s")
