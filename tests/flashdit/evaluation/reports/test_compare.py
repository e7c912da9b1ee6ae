import json
from copy import deepcopy
from pathlib import Path

import pytest

from flashdit.commands import evaluate as eval_fid
from flashdit.evaluation.reports.compare import (
    column_names,
    comparison_rows,
    differences,
    verdicts,
)

RESULT = {
    "schema": 2,
    "metrics": {"fid_50k": 3.94, "precision": 0.8},
    "labels": {"fid_50k": "FID", "precision": "precision"},
    "num_images": 50_000,
    "samples": {"source": "npz", "labels": "balanced"},
    "image_size": [256, 256],
    "reference": {"name": "a.npz", "num_images": None, "sha256": "a" * 64},
    "extractor": {"name": "inception", "fingerprint": "Inception:sha256=" + "b" * 64, "resize": "tf1"},
    "settings": {"neighbours": 3, "split_size": 5000},
}


def changed(part: str, value, key: str | None = None) -> dict:
    result = deepcopy(RESULT)
    if key is None:
        result[part] = value
    else:
        result[part][key] = value
    return result


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (changed("num_images", 10_000), "number of samples: 50000 and 10000"),
        (
            changed("extractor", "Digits:sha256=" + "c" * 64, "fingerprint"),
            f"extractor: Inception:sha256={'b' * 12} and Digits:sha256={'c' * 12}",
        ),
        (changed("extractor", "torch's own", "resize"), "resize: tf1 and torch's own"),
        (changed("reference", "d" * 64, "sha256"), f"reference: {'a' * 12} and {'d' * 12}"),
        (changed("reference", 10_000, "num_images"), "number of reference images: unknown and 10000"),
        (changed("image_size", [512, 512]), "image size: [256, 256] and [512, 512]"),
        (changed("samples", None, "labels"), "label mode: balanced and unknown"),
        (changed("settings", {"neighbours": 5}), "settings: {'neighbours': 3, 'split_size': 5000} and"),
    ],
)
def test_each_condition_that_differs_is_named(other, reason):
    (found,) = differences(RESULT, other)
    assert found.startswith(reason)
    (verdict,) = verdicts(["a", "b"], [RESULT, other])
    assert verdict.startswith("a and b are not comparable: " + reason)


def test_equal_conditions_are_comparable_whatever_the_samples_were_made_with():
    other = changed("samples", {"source": "checkpoint", "labels": "balanced", "nfe": 50})
    assert not differences(RESULT, other)
    assert verdicts(["a", "b"], [RESULT, other])[0].startswith("all of them are comparable")


def test_rows_are_by_what_tables_call_the_scores():
    other = deepcopy(RESULT)
    other["metrics"] = {"fid_10k": None, "recall": 0.5}
    other["labels"] = {"fid_10k": "FID", "recall": "recall"}
    assert comparison_rows(["a", "b"], [RESULT, other]) == [
        ["metric", "a", "b"],
        ["samples", "50,000", "50,000"],
        ["FID", "3.9400", "n/a"],
        ["precision", "0.8000", "–"],
        ["recall", "–", "0.5000"],
    ]


def test_columns_are_called_by_as_much_of_the_path_as_tells_them_apart():
    assert column_names([Path("x/cfg_1.json"), Path("x/cfg_2.json")]) == ["cfg_1", "cfg_2"]
    assert column_names([Path("r/a/metrics.json"), Path("r/b/metrics.json")]) == ["a/metrics", "b/metrics"]
    assert column_names([Path("a.json"), Path("a.json")]) == ["1: a.json", "2: a.json"]


def test_the_command_prints_and_writes_the_table_and_the_verdict(tmp_path, capsys):
    for name, result in (("a", RESULT), ("b", changed("num_images", 10_000))):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    arguments = [str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--output", str(tmp_path / "both.md")]
    eval_fid.main(["compare", *arguments])
    assert "not comparable: number of samples" in capsys.readouterr().out
    text = (tmp_path / "both.md").read_text()
    assert "| FID | 3.9400 | 3.9400 |" in text
    assert "- a and b are not comparable: number of samples: 50000 and 10000" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"compare reads the metrics.json of evaluations, got .*r\.json: Expecting"),
        ('{"schema": 1, "metrics": {}}', r"got .*r\.json: schema 1 and not 2"),
        ("[]", r"got .*r\.json: it must hold a mapping, got list"),
        ("[" * 9999, r"got .*r\.json: its parts lie too deep in one another"),
        (json.dumps({name: value for name, value in RESULT.items() if name != "settings"}), "no 'settings'"),
        (json.dumps(changed("reference", "adm.npz")), r"got .*r\.json: "),
        (json.dumps(changed("num_images", None)), r"got .*r\.json: num_images must be a whole number"),
        (json.dumps(changed("labels", [])), r"got .*r\.json: "),
        (json.dumps(changed("metrics", {})), r"got .*r\.json: no 'fid_50k'"),
        (json.dumps(changed("metrics", {"fid_50k": "good", "precision": None})), r"got .*r\.json: "),
    ],
)
def test_what_is_no_result_is_refused(tmp_path, content, message):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        eval_fid.main(["compare", str(tmp_path / "r.json")])
    with pytest.raises(ValueError, match=r"got .*absent\.json"):
        eval_fid.main(["compare", str(tmp_path / "absent.json")])
