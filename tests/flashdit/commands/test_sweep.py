"""eval_fid.py sweep as a user runs it, on a tiny checkpoint."""

import json

import numpy as np
import pytest
from PIL import Image

from flashdit.commands import evaluate as eval_fid
from flashdit.commands.sweep import main, parse_scales
from flashdit.digits.images import digits
from flashdit.evaluation import evaluate as evaluation
from flashdit.evaluation.images.sources import GeneratedSource
from flashdit.evaluation.reference import Reference


@pytest.mark.parametrize(
    ("text", "scales"),
    [
        ("1:4:0.5", [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]),
        ("1:2:0.3", [1.0, 1.3, 1.6, 1.9]),  # the end is not among them
        ("1:1.3:0.1", [1.0, 1.1, 1.2, 1.3]),  # though 0.3 / 0.1 is below 3
        ("2:2:1", [2.0]),
        ("3,1,1.5,3", [1.0, 1.5, 3.0]),
        ("0", [0.0]),
    ],
)
def test_ranges_include_both_ends_and_lists_are_sorted(text, scales):
    assert parse_scales(text) == scales


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1:4", "LOW:HIGH:STEP or finite numbers with commas, got '1:4'"),
        ("1,x", "LOW:HIGH:STEP or finite numbers with commas, got '1,x'"),
        ("", "LOW:HIGH:STEP or finite numbers with commas, got ''"),
        ("1,nan", "LOW:HIGH:STEP or finite numbers"),
        ("1:inf:1", "LOW:HIGH:STEP or finite numbers"),
        ("4:1:0.5", "LOW ≤ HIGH, STEP > 0"),
        ("1:4:0", "LOW ≤ HIGH, STEP > 0"),
        ("1:4:1e-9", "at most 1,000 steps"),
        ("-1,2", "must not be negative, got '-1,2'"),
    ],
)
def test_scales_that_cannot_be_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_scales(text)


@pytest.fixture
def drawn(monkeypatch):
    """Counts the images that are drawn and the references that are read."""
    counts = {"images": [], "references": 0}
    batches, statistics = GeneratedSource.batches, Reference._read

    def counted_batches(self, batch_size, ids=None):
        for images in batches(self, batch_size, ids):
            counts["images"] += [self.options.cfg_scale] * len(images)
            yield images

    def counted_statistics(self, *arguments):
        counts["references"] += 1
        return statistics(self, *arguments)

    monkeypatch.setattr(GeneratedSource, "batches", counted_batches)
    monkeypatch.setattr(Reference, "_read", counted_statistics)
    return counts


@pytest.fixture
def call(tiny_checkpoint, tmp_path):
    """Calls the sweep of 6 images at a scale against 20 digits; returns what sweep.json holds then."""
    reference = tmp_path / "reference.npz"
    images, _ = digits("held-out")
    np.savez(reference, images[:20].permute(0, 2, 3, 1).numpy())

    def sweep(scales, *options):
        what = [
            "--checkpoint",
            tiny_checkpoint,
            "--reference",
            reference,
            "--extractor",
            "digits",
            "--device",
            "cpu",
        ]
        how = [
            "--num-images",
            6,
            "--steps",
            2,
            "--metrics",
            "fid,recall",
            "--no-cache",
            "--output",
            tmp_path / "out",
        ]
        main([str(word) for word in (*what, *how, "--cfg-scale", scales, *options)])
        return json.loads((tmp_path / "out" / "sweep.json").read_text())

    return sweep


def test_a_sweep_computes_only_what_is_new_and_reads_the_reference_once(call, drawn, tmp_path, capsys):
    first = call("1:3:1")
    assert [point["cfg_scale"] for point in first["points"]] == [1.0, 2.0, 3.0]
    assert [point["nfe"] for point in first["points"]] == [2, 4, 4]
    assert len({point["metrics"]["fid"] for point in first["points"]}) == 3
    assert drawn["images"] == [1.0] * 6 + [2.0] * 6 + [3.0] * 6
    assert drawn["references"] == 1
    assert first["title"].endswith(
        "step 7, ema weights: 6 images, euler 2, against " + str(tmp_path / "reference.npz")
    )
    with Image.open(tmp_path / "out" / "sweep.png") as plot:
        assert plot.format == "PNG"
    assert (tmp_path / "out" / "sweep.md").read_text().count("**") == 4  # the best of two scores

    drawn["images"].clear()
    second = call("2,2.5,3")
    assert drawn["images"] == [2.5] * 6
    assert [point["cfg_scale"] for point in second["points"]] == [1.0, 2.0, 2.5, 3.0]
    assert [point for point in second["points"] if point["cfg_scale"] != 2.5] == first["points"]
    assert "2 of 3 scales are in" in capsys.readouterr().out


def test_a_point_is_what_eval_fid_says_of_that_scale(call, tiny_checkpoint, tmp_path):
    (point,) = call("2")["points"]
    words = [
        "--checkpoint",
        tiny_checkpoint,
        "--reference",
        tmp_path / "reference.npz",
        "--extractor",
        "digits",
    ]
    words += ["--num-images", 6, "--steps", 2, "--metrics", "fid,recall", "--no-cache", "--cfg-scale", 2]
    eval_fid.main([str(word) for word in (*words, "--device", "cpu", "--output", tmp_path / "single.json")])
    single = json.loads((tmp_path / "single.json").read_text())
    assert list(point["metrics"].values()) == list(single["metrics"].values())


def test_another_recipe_starts_anew_and_forgets_nothing(call, drawn):
    call("1,2")
    other = call("1", "--steps", "3", "--cfg-interval", "0.2", "0.8")
    assert [point["nfe"] for point in other["points"]] == [3]
    assert "guidance for t in 0.2–0.8" in other["title"]
    drawn["images"].clear()
    again = call("1,2")
    assert drawn["images"] == []
    assert [point["cfg_scale"] for point in again["points"]] == [1.0, 2.0]
    assert [len(sweep["points"]) for sweep in again["others"]] == [1]


def test_a_sweep_that_was_stopped_goes_on(call, drawn, monkeypatch):
    evaluate, calls = evaluation.evaluate, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(evaluation, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        call("1,2")
    call("1,2")
    assert drawn["images"] == [1.0] * 6 + [2.0] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metrics", "fid,recal"], "unknown metric 'recal'; did you mean 'recall'"),
        (["--metrics", "accuracy"], "accuracy needs an extractor of the samples' own classes"),
        (["--num-images", "0"], "the number of images must be positive, got 0"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--extractor", "digit"], "unknown extractor 'digit'; did you mean 'digits'"),
        (["--output", __file__], "--output must be a folder, got"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_drawn(call, drawn, options, message):
    with pytest.raises(ValueError, match=message):
        call("1,2", *options)
    assert drawn["images"] == []


def test_scales_must_be_given(tiny_checkpoint, capsys):
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(tiny_checkpoint)])
    assert "--cfg-scale" in capsys.readouterr().err
