import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from flashdit.digits.reference import DigitsSource
from flashdit.evaluation.features.extractor import EXTRACTORS
from flashdit.evaluation.features.statistics import ImageStatistics, collect
from flashdit.evaluation.metrics.metric import METRICS
from flashdit.evaluation.metrics.scoring import (
    Scores,
    cautions,
    check_classes,
    check_counts,
    compute_scores,
    default_metrics,
    in_order,
    parts_needed,
    score_names,
)
from flashdit.evaluation.reports.report import (
    count_key,
    print_table,
    shown,
    to_markdown,
    write_report,
)

EXTRACTOR = EXTRACTORS.build("digits")
PARTS = parts_needed(METRICS.names())


@pytest.fixture(scope="module")
def held_out() -> ImageStatistics:
    return collect(DigitsSource("held-out"), EXTRACTOR, PARTS, 100)


class OneClass(DigitsSource):
    """The training sevens."""

    def __init__(self):
        super().__init__("train")
        self.images = self.images[self.labels == 7]
        self.labels, self.count = self.labels[self.labels == 7], len(self.images)


@pytest.mark.parametrize("name", METRICS.names())
def test_every_metric_gives_a_number_for_each_of_its_keys(name, held_out):
    scores = compute_scores([name], held_out, held_out)
    assert list(scores.values) == [score.key for score in METRICS[name].scores]
    assert scores.reasons.keys() <= {"is_std"}  # of one chunk
    assert list(score_names([name], EXTRACTOR)) == list(scores.values)


@pytest.mark.parametrize("name", METRICS.names())
def test_every_metric_says_why_it_is_missing(name):
    empty = ImageStatistics(name="adm.npz", count=10)
    scores = compute_scores([name], empty, empty)
    assert scores.values == dict.fromkeys(score.key for score in METRICS[name].scores)
    told = ("'adm.npz' has no ", "the extractor has no ")
    assert all(reason.startswith(told) for reason in scores.reasons.values())


def test_precision_and_recall_are_not_exchanged(held_out):
    half = collect(OneClass(), EXTRACTOR, PARTS, 100)
    scores = compute_scores(["precision", "recall"], half, held_out).values
    assert scores["precision"] > 0.8, "real sevens lie among the real digits"
    assert scores["recall"] < 0.2, "most digits do not lie among the sevens"
    apart = (
        compute_scores(["recall"], half, held_out).values
        | compute_scores(["precision"], half, held_out).values
    )
    assert scores == apart, "together they meet each pair of images once"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_scores_on_a_gpu_equal_those_on_the_cpu(held_out):
    names = [name for name in METRICS.names() if name != "kid"]
    found = []
    for device in ("cpu", "cuda"):
        extractor = EXTRACTORS.build("digits").to(device)
        samples = collect(DigitsSource("train"), extractor, PARTS, 100, device)
        found.append(compute_scores(names, samples, held_out, device).values)
    assert found[1] == pytest.approx(found[0], rel=5e-3)


def test_default_metrics_are_all_that_apply_but_kid():
    assert default_metrics(True) == ["fid", "sfid", "is", "precision", "recall", "accuracy"]
    assert default_metrics(False) == ["fid", "sfid", "is", "precision", "recall"]


def test_a_score_that_is_not_finite_becomes_a_reason(held_out, monkeypatch):
    nan = replace(METRICS["fid"], compute=lambda samples, reference: (float("nan"),))
    monkeypatch.setitem(METRICS.entries, "fid", nan)
    scores = compute_scores(["fid"], held_out, held_out)
    assert scores.values == {"fid": None}
    assert scores.reasons == {"fid": "it came out as nan"}


def test_unknown_metric_names_the_nearest():
    with pytest.raises(ValueError, match="unknown metric 'precison'; did you mean 'precision'"):
        in_order(["fid", "precison"])


def test_accuracy_by_an_extractor_of_other_classes_is_refused():
    check_classes(["accuracy"], "")
    with pytest.raises(
        ValueError, match="accuracy needs an extractor of the samples' own classes: it is blind"
    ):
        check_classes(["accuracy"], "it is blind")


def test_too_few_images_are_refused_by_count(held_out):
    with pytest.raises(
        ValueError, match=r"at least 4 images on each side, got 3 of the samples and 360 of the reference"
    ):
        check_counts(["recall"], 3, held_out)
    with pytest.raises(ValueError, match="at least 2 images on each side"):
        check_counts(["fid"], 1, held_out)


def test_fewer_images_than_dimensions_are_cautioned():
    few = ImageStatistics(name="few", count=60, mu=torch.zeros(64))
    assert "covariance of 60 images of 'few' is rank-deficient in 64" in cautions(["fid"], few, few)[0]
    assert not cautions(["sfid"], few, few)


def test_the_rank_of_all_covariances_is_one_sentence():
    means = {"mu": torch.zeros(64), "mu_s": torch.zeros(112)}
    samples, reference = (
        ImageStatistics(name=name, count=count, **means) for name, count in (("few", 60), ("some", 90))
    )
    assert cautions(["fid", "sfid"], samples, reference) == [
        "the covariance of 60 images of 'few' is rank-deficient in 64 and 112 dimensions, that of 90 images "
        "of 'some' in 112 dimensions: compare Fréchet distances only at the same number of images"
    ]


def test_report_keeps_null_with_its_reason_and_leaves_no_temporary_file(tmp_path, held_out, result_of):
    reference = ImageStatistics(name="adm.npz", count=None, mu=held_out.mu, sigma=held_out.sigma)
    floor = Scores(count=1437, values={"fid": 1.0})
    result = result_of(compute_scores(["fid", "sfid"], held_out, reference), floor=floor)
    write_report(result, tmp_path / "new" / "metrics.json")
    content = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert content["schema"] == 2
    assert content["metrics"]["sfd_360"] is None
    assert content["reasons"] == {"sfd_360": "'adm.npz' has no spatial statistics"}
    assert content["floor"] == {"fd_1437": 1.0}
    assert content["labels"] == {"fd_360": "FD[digits]", "sfd_360": "sFD[digits]"}
    assert content["extractor"]["fingerprint"] == EXTRACTOR.fingerprint
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"metrics.json", "metrics.md"}


def test_tables_call_only_inception_fid_and_show_no_negative_distance(result_of):
    scores = Scores(count=360, values={"fid": -1e-12, "sfid": None}, reasons={"sfid": "no reason"})
    result = result_of(scores)
    markdown = to_markdown(result)
    assert "| FD[digits] | 0.0000 |" in markdown
    assert "| sFD[digits] | n/a |" in markdown
    assert "- sFD[digits]: no reason" in markdown
    assert "FID" not in markdown


def test_console_table_shows_names_in_brackets(result_of):
    stream = io.StringIO()
    print_table(result_of(Scores(count=360, values={"fid": 1.5})), Console(width=100, file=stream))
    text = stream.getvalue()
    assert "FD[digits]" in text
    assert "1.5000" in text
    assert "count unknown" in text


def test_where_no_floor_is_known_the_table_of_a_distance_says_what_gives_one(result_of):
    def printed(values, floor=None):
        stream = io.StringIO()
        result = result_of(Scores(count=360, values=values))
        result.floor = floor
        print_table(result, Console(width=100, file=stream))
        return stream.getvalue()

    pointer = "two halves of the reference's images give the floor"
    assert printed({"fid": 1.5}).count(pointer) == 1
    assert pointer not in printed({"fid": 1.5}, Scores(count=360, values={"fid": 0.1}))
    assert pointer not in printed({"is_mean": 1.5})
    assert pointer not in to_markdown(result_of(Scores(count=360, values={"fid": 1.5})))


@pytest.mark.parametrize(
    ("count", "key"),
    [(50_000, "fid_50k"), (1000, "fid_1k"), (1234, "fid_1234"), (500, "fid_500"), (10_500, "fid_10500")],
)
def test_keys_carry_the_number_of_images(count, key):
    assert count_key("fid", count) == key


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "n/a"), (3.94256, "3.9426"), (0.00123, "0.001230"), (-1e-9, "0.0000"), (-0.0002, "-0.000200")],
)
def test_small_scores_are_shown_in_more_decimals_and_rounding_in_none(value, text):
    assert shown(value) == text


def test_samples_sorted_by_class_are_cautioned():
    labels = torch.arange(10).repeat_interleave(501)
    in_order = ImageStatistics(name="samples", count=5010, labels=labels)
    assert "sorted by class" in cautions(["is"], in_order, in_order)[0]
    by_logits = ImageStatistics(name="samples", count=5010, logits=torch.eye(10)[labels.flip(0)])
    assert "sorted by class" in cautions(["is"], by_logits, by_logits)[0]
    shuffled_labels = labels[torch.randperm(5010, generator=torch.Generator().manual_seed(0))]
    for others in (shuffled_labels, labels[:5000], None):  # in another order, in one chunk, unknown
        shuffled = ImageStatistics(name="samples", count=5010, labels=others)
        assert not cautions(["is"], shuffled, shuffled)


def test_a_default_metric_that_does_not_import_is_left_out_with_a_warning(monkeypatch, caplog):
    from flashdit.shared import registry

    known = registry.announced("flashdit.metrics") | {"absent": "no_such_module"}
    monkeypatch.setattr(registry, "announced", lambda group: known)
    names = default_metrics(False)
    assert "fid" in names
    assert "absent" not in names
    assert "left out: metric 'absent' must import" in caplog.text


def test_one_chunk_has_an_inception_score_and_no_spread():
    logits = torch.randn(5001, 3, generator=torch.Generator().manual_seed(0))
    one, two = (ImageStatistics(name="samples", count=n, logits=logits[:n]) for n in (60, 5001))
    scores = compute_scores(["is"], one, one)
    p = logits[:60].double().softmax(1)
    expected = (p * (p.log() - p.mean(0).log())).sum(1).mean().exp().item()
    assert scores.values["is_mean"] == pytest.approx(expected)
    assert scores.values["is_std"] is None
    assert scores.reasons["is_std"] == "60 images are one chunk of 5,000, which has no spread"
    assert compute_scores(["is"], two, two).values["is_std"] > 0
