"""What the digits bring: which of them are trained on, scored against and by what."""

import torch
from sklearn.datasets import load_digits

from flashdit.data.sources import DATASETS, companions_of


def test_training_and_held_out_digits_are_all_of_scikit_learns_and_none_is_mirrored():
    source, brought = DATASETS.build({"name": "digits"}), companions_of("digits")
    assert source.mirrors is False, "a mirrored 2 is none"
    assert source.class_names[:3] == ["zero", "one", "two"]
    held_out, floor = brought.reference(), brought.floor()
    assert (len(source.labels), floor.count, held_out.count) == (1437, 1437, 360)
    assert torch.equal(floor.labels, source.labels)
    assert torch.equal(torch.cat(list(floor.batches(1437))), source.images)
    both = torch.cat([source.labels, held_out.labels])
    assert torch.equal(both.bincount(), torch.tensor(load_digits().target).bincount())
    shares = held_out.labels.bincount() / both.bincount()
    assert (shares - 0.2).abs().max() < 0.01, "each digit by the same share"


def test_samples_are_scored_by_the_digits_own_classifier_and_there_are_a_thousand():
    brought = companions_of("digits")
    assert (brought.extractor, brought.num_images) == ("digits", 1000)
    assert (brought.autoencoder / "config.json").is_file()
