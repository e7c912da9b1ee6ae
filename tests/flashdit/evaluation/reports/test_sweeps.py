"""sweep.json, its table and its plot: pure content, no model."""

import json
from dataclasses import asdict

import pytest
from PIL import Image

from flashdit.evaluation.reports.sweeps import (
    Sweep,
    draw_sweep,
    read_sweeps,
    sweep_markdown,
    sweep_rows,
    write_sweep,
)

RECIPE = {"samples": {"weights_sha256": "ab", "interval": (0.0, 1.0)}, "metrics": ["fid", "is", "precision"]}
LABELS = {"fid": "FD[digits]", "is_mean": "IS[digits]", "is_std": "IS[digits] std", "precision": "precision"}


def point(scale, fid, is_mean, precision, **others):
    metrics = {"fid": fid, "is_mean": is_mean, "is_std": 0.1, "precision": precision}
    return {
        "cfg_scale": scale,
        "nfe": 8,
        "metrics": metrics,
        "reasons": {},
        "warnings": [],
        "elapsed_s": 1.0,
    } | others


@pytest.fixture
def sweep():
    made = Sweep(recipe=dict(RECIPE), labels=dict(LABELS), floor={"fid": 0.5, "precision": 0.9})
    for scale, fid, is_mean, precision in ((2.0, 3.0, 9.0, 0.9), (1.0, 4.0, 8.0, 0.5), (1.5, 2.0, 9.0, 0.9)):
        made.add(point(scale, fid, is_mean, precision))
    return made


def test_points_lie_by_scale_and_the_best_is_the_lowest_distance_and_the_highest_share(sweep):
    assert sweep.scales() == [1.0, 1.5, 2.0]
    assert sweep.best() == {"fid": 1.5, "is_mean": 1.5, "precision": 1.5}  # of equal scores the smaller scale


def test_a_score_that_could_not_be_had_is_no_point_of_its_curve(sweep):
    sweep.add(point(2.5, None, 9.5, 0.8, reasons={"fid": "it came out as nan"}))
    assert sweep.curve("fid") == ([1.0, 1.5, 2.0], [4.0, 2.0, 3.0])
    assert sweep.best()["is_mean"] == 2.5
    assert sweep_rows(sweep)[4][2] == "n/a"
    assert "- FD[digits]: it came out as nan" in sweep_markdown(sweep)


def test_table_marks_the_best_and_ends_with_the_real_images(sweep):
    rows = sweep_rows(sweep)
    assert rows[0] == ["guidance", "NFE", "FD[digits]", "IS[digits]", "precision"]
    assert rows[1] == ["1", "8", "4.0000", "8.0000", "0.5000"]
    assert rows[2] == ["1.5", "8", "**2.0000**", "**9.0000**", "**0.9000**"]
    assert rows[4] == ["real train", "", "0.5000", "n/a", "0.9000"]


def test_what_is_written_comes_back_and_other_recipes_are_kept(sweep, tmp_path):
    write_sweep(tmp_path, sweep, [])
    same, others = read_sweeps(tmp_path / "sweep.json", RECIPE)  # with a tuple where JSON has a list
    assert same.points == sweep.points
    assert same.labels == sweep.labels
    assert others == []
    new, others = read_sweeps(tmp_path / "sweep.json", RECIPE | {"metrics": ["fid"]})
    assert new.points == []
    new.labels = {"fid": "FD[digits]"}
    new.add(point(1.0, 7.0, None, None))
    write_sweep(tmp_path, new, others)
    again, kept = read_sweeps(tmp_path / "sweep.json", RECIPE)
    assert again.points == sweep.points
    assert [other["recipe"]["metrics"] for other in kept] == [["fid"]]
    assert json.loads((tmp_path / "sweep.json").read_text())["best"] == {"fid": 1.0}


WHOLE = {"schema": 1, "others": [], **asdict(Sweep(recipe=RECIPE))}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be a sweep's JSON of schema 1, got"),
        ("[]", "of schema 1"),
        ('{"schema": 0, "others": []}', "of schema 1"),
        ('{"schema": 1, "others": [3]}', "of schema 1, got"),
        ('{"schema": 1, "others": 3}', "of schema 1, got"),
        (json.dumps(WHOLE | {"floor": "x"}), "of schema 1, got scores that are no mapping"),
        (json.dumps(WHOLE | {"points": [None]}), "of schema 1, got"),
        (json.dumps(WHOLE | {"points": [{"cfg_scale": "1", "metrics": {}}]}), "of schema 1, got"),
    ],
)
def test_a_file_that_no_sweep_wrote_is_refused(tmp_path, text, message):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_sweeps(tmp_path / "sweep.json", RECIPE)


def test_plot_is_a_picture_and_nothing_else_is_left(sweep, tmp_path):
    draw_sweep(sweep, tmp_path / "sweep.png")
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.format == "PNG"
        width, height = picture.size
    assert width > 1500
    assert 300 < height < 600  # three panels in one row
    assert [file.name for file in tmp_path.iterdir()] == ["sweep.png"]


def test_a_sweep_without_scores_draws_nothing(tmp_path):
    draw_sweep(Sweep(recipe={}), tmp_path / "sweep.png")
    assert list(tmp_path.iterdir()) == []
