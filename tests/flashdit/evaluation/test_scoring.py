import io
import json

import pytest
import torch
from rich.console import Console

from flashdit.data.digits import CLASS_NAMES
from flashdit.evaluation.features import EXTRACTORS
from flashdit.evaluation.report import EvalResult, names_of, print_table, to_markdown, write_report
from flashdit.evaluation.scoring import (
    METRICS,
    Scores,
    cautions,
    check_accuracy,
    check_counts,
    check_names,
    compute_scores,
    parts_needed,
)
from flashdit.evaluation.sources import DigitsSource
from flashdit.evaluation.statistics import ImageStatistics, collect

EXTRACTOR = EXTRACTORS.build("digits")
PARTS = parts_needed(METRICS)


@pytest.fixture(scope="module")
def held_out() -> ImageStatistics:
    return collect(DigitsSource("held-out"), EXTRACTOR, PARTS, 100)


def result_of(scores: Scores, **changes) -> EvalResult:
    names = names_of(EXTRACTOR)
    fields = {
        "scores": scores.renamed(names),
        "floor": None,
        "labels": dict(names[key] for key in scores.values),
        "num_images": 360,
        "samples": {"source": "npz", "path": "[bold]s.npz"},
        "reference": {"name": "adm.npz", "num_images": None},
        "extractor": {"name": "digits", "fingerprint": EXTRACTOR.fingerprint},
        "settings": {"neighbours": 3, "split_size": 5000},
        "device": "cpu",
        "timings_s": {"samples": 1.0},
    }
    return EvalResult(**(fields | changes))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_gives_a_number_for_each_of_its_keys(name, held_out):
    scores = compute_scores([name], held_out, held_out)
    assert tuple(scores.values) == METRICS[name].keys
    assert not scores.reasons
    assert set(scores.values) <= set(names_of(EXTRACTOR))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_says_why_it_is_missing(name):
    empty = ImageStatistics(name="adm.npz", count=10)
    scores = compute_scores([name], empty, empty)
    assert scores.values == dict.fromkeys(METRICS[name].keys)
    assert all(reason.startswith("'adm.npz' has no ") for reason in scores.reasons.values())


@pytest.mark.parametrize("batch_size", [1, 37])
def test_scores_do_not_depend_on_the_batch_size(batch_size, held_out):
    source = DigitsSource("held-out")
    source.images, source.labels, source.count = source.images[:90], source.labels[:90], 90
    first, second = (
        compute_scores(METRICS, collect(source, EXTRACTOR, PARTS, size), held_out)
        for size in (batch_size, 90)
    )
    assert first.values == pytest.approx(second.values, rel=1e-4)


def test_a_score_that_is_not_finite_becomes_a_reason(held_out, monkeypatch):
    nan = METRICS["fid"]._replace(compute=lambda samples, reference: (float("nan"),))
    monkeypatch.setitem(METRICS, "fid", nan)
    scores = compute_scores(["fid"], held_out, held_out)
    assert scores.values == {"fid": None}
    assert scores.reasons == {"fid": "it came out as nan"}


def test_unknown_metric_names_the_nearest():
    with pytest.raises(ValueError, match="unknown metric 'precison'; did you mean 'precision'"):
        check_names(["fid", "precison"])


def test_accuracy_by_an_extractor_of_other_classes_is_refused():
    check_accuracy(["accuracy"], EXTRACTOR, CLASS_NAMES)
    for classes in (["cat", "dog"], None):
        with pytest.raises(ValueError, match="accuracy needs an extractor of the samples' own classes"):
            check_accuracy(["accuracy"], EXTRACTOR, classes)


def test_too_few_images_are_refused_by_count(held_out):
    with pytest.raises(
        ValueError, match=r"at least 4 images on each side, got {'samples': 3, 'reference': 360}"
    ):
        check_counts(["recall"], 3, held_out)
    with pytest.raises(ValueError, match="at least 2 images on each side"):
        check_counts(["fid"], 1, held_out)


def test_fewer_images_than_dimensions_are_cautioned():
    few = ImageStatistics(name="few", count=60, mu=torch.zeros(64))
    assert "covariance of 60 images of 'few' is rank-deficient in 64" in cautions(["fid"], few, few)[0]
    assert not cautions(["sfid"], few, few)


def test_report_keeps_null_with_its_reason_and_leaves_no_temporary_file(tmp_path, held_out):
    reference = ImageStatistics(name="adm.npz", count=None, mu=held_out.mu, sigma=held_out.sigma)
    result = result_of(compute_scores(["fid", "sfid"], held_out, reference), floor=Scores(values={"fd": 1.0}))
    write_report(result, tmp_path / "new" / "metrics.json")
    content = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert content["schema"] == 1
    assert content["metrics"]["sfd"] is None
    assert content["reasons"] == {"sfd": "'adm.npz' has no spatial statistics"}
    assert content["floor"] == {"fd": 1.0}
    assert content["extractor"]["fingerprint"] == EXTRACTOR.fingerprint
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"metrics.json", "metrics.md"}


def test_tables_call_only_inception_fid_and_show_no_negative_distance():
    result = result_of(Scores(values={"fid": -1e-12, "sfid": None}, reasons={"sfid": "no reason"}))
    markdown = to_markdown(result)
    assert "| FD[digits] | 0.0000 |" in markdown
    assert "| sFD[digits] | n/a |" in markdown
    assert "- sFD[digits]: no reason" in markdown
    assert "FID" not in markdown


def test_console_table_shows_names_in_brackets():
    stream = io.StringIO()
    print_table(result_of(Scores(values={"fid": 1.5})), Console(width=100, file=stream))
    text = stream.getvalue()
    assert "FD[digits]" in text
    assert "1.5000" in text
    assert "count unknown" in text
