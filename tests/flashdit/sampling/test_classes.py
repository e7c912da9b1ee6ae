import pytest
import torch

from flashdit.sampling.classes import balanced_labels, choose_labels, class_ids, equal_shares, random_labels
from flashdit.sampling.imagenet import shown_names

NAMES = ["cat", "golden retriever", "hen"]
BIRDS = ["crane", "white stork, Ciconia ciconia", "crane", "7"]


def test_balanced_labels_are_balanced_shuffled_and_seeded():
    labels = balanced_labels(1003, 10, seed=1)
    assert labels.bincount().tolist() == [101, 101, 101] + [100] * 7
    assert labels.equal(balanced_labels(1003, 10, seed=1))
    assert not labels.equal(balanced_labels(1003, 10, seed=2))
    assert not labels.equal(labels.sort().values)


def test_equal_shares_stand_in_the_order_of_the_classes():
    assert equal_shares(5, [7, 3]).tolist() == [7, 7, 7, 3, 3]
    assert equal_shares(2, [4, 5, 6]).tolist() == [4, 5]
    assert equal_shares(1003, range(10)).bincount().sub(100).unique().tolist() == [0, 1]


def test_random_labels_depend_on_seed_and_number_alone():
    labels = random_labels(2000, [3, 8], seed=1)
    assert labels.unique().tolist() == [3, 8]
    assert 900 < (labels == 3).sum() < 1100
    assert labels[:50].equal(random_labels(50, [3, 8], seed=1))
    assert not labels.equal(random_labels(2000, [3, 8], seed=2))
    assert labels.dtype == torch.int64


def test_classes_go_by_id_or_name():
    assert class_ids(["2", "golden retriever", "0"], NAMES) == [2, 1, 0]
    assert class_ids(["Golden Retriever", " HEN"], NAMES) == [1, 2]
    assert class_ids(["all"], NAMES) == [0, 1, 2]
    assert class_ids(["ciconia ciconia", "white stork", BIRDS[1]], BIRDS) == [1, 1, 1]
    assert class_ids([2, 0], NAMES) == [2, 0]
    assert class_ids(["crane"], ["Crane", "crane"]) == [1], "a name as it is written comes first"
    assert class_ids(["7", "2"], BIRDS) == [3, 2], "a name of digits comes before a number"


@pytest.mark.parametrize(
    ("name", "names", "message"),
    [
        ("207", NAMES, r"class 207 is out of range for this 3-class model \(0–2\)"),
        ("-1", NAMES, r"class -1 is out of range for this 3-class model \(0–2\)"),
        ("golden retreiver", NAMES, "unknown class 'golden retreiver'; did you mean 'golden retriever'"),
        ("xyz", NAMES, r"unknown class 'xyz' \(this model has 3 classes: cat, golden retriever, hen\)"),
        ("crane", BIRDS, "class 'crane' must name one class, got 0 and 2: give the id"),
        ("Crane", BIRDS, "class 'Crane' must name one class, got 0 and 2: give the id"),
        ("0", [], "this model has no classes, got class 0"),
    ],
)
def test_invalid_classes_are_named(name, names, message):
    with pytest.raises(ValueError, match=message):
        class_ids([name], names)


def test_labels_are_ten_of_the_first_ten_classes_unless_others_are_chosen():
    names = [f"bird {i}" for i in range(12)]
    assert choose_labels(names, None, None).bincount().tolist() == [10] * 10
    assert choose_labels(names, None, 24).bincount().tolist() == [2] * 12
    assert choose_labels(names, ["bird 11", 3], None).tolist() == [11] * 10 + [3] * 10
    assert choose_labels(names, [3], 2).tolist() == [3, 3]
    assert choose_labels([], None, 2).tolist() == [0, 0], "the null label of a model without classes"
    drawn = choose_labels(names, [3, 8], 50, order="random", seed=1)
    assert drawn.equal(random_labels(50, [3, 8], seed=1))
    with pytest.raises(ValueError, match="num_images must be at least 1, got -1"):
        choose_labels(names, None, -1)
    with pytest.raises(ValueError, match="unknown labels 'radnom'; did you mean 'random'"):
        choose_labels(names, None, 2, order="radnom")


def test_imagenets_classes_go_by_number_wordnet_id_and_words_where_latents_have_no_names():
    numbers = [str(i) for i in range(1000)]
    asked = ["207", "n02099601", "golden retriever", "Golden Retriever"]
    assert class_ids(asked, numbers) == [207] * 4
    assert class_ids(["tench", "Tinca tinca", "toilet tissue"], numbers) == [0, 0, 999]
    assert shown_names(numbers)[207] == "golden retriever"
    with pytest.raises(ValueError, match=r"class 'crane' must name one class, got 134 and 517: give the id"):
        class_ids(["crane"], numbers)
    with pytest.raises(ValueError, match="unknown class 'golden retreiver'; did you mean 'golden retriever'"):
        class_ids(["golden retreiver"], numbers)


def test_folders_named_by_wordnet_ids_go_by_words_in_any_number_and_order():
    names = ["n02099601", "cat", "n01440764", "n00005787"]  # the last one is of ImageNet-22k alone
    assert class_ids(["tench", "golden retriever", "n02099601", "1"], names) == [2, 0, 0, 1]
    assert shown_names(names) == ["golden retriever", "cat", "tench", "benthos"]


def test_a_thousand_classes_with_names_of_their_own_are_not_imagenets():
    names = [f"kind {i}" for i in range(1000)]
    assert shown_names(names) == names
    with pytest.raises(ValueError, match="unknown class 'golden retriever'"):
        class_ids(["golden retriever"], names)
    assert shown_names(["0", "1"]) == ["0", "1"]
