import json
import math
from pathlib import Path

import pytest
import yaml
from PIL import Image

from flashdit import config, digits
from flashdit.commands import plot
from flashdit.commands.curves import (
    SHIPPED_CURVES,
    holds,
    read_reference,
    read_run,
    shipped_references,
    smooth,
    thin,
)
from flashdit.shared.settings import to_yaml
from flashdit.trainer import Trainer


def make_run(folder, records, **task):
    """Writes what plotting reads of a run."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0, **task}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def falling(points=40, scores=False):
    for step in range(1, points + 1):
        record = {"step": step, "images_seen": 16 * step, "loss": 1 / step + 0.2, "lr": 0.1, "note": "text"}
        yield record | ({"fid_200": 90.0 / step, "fd_digits_200": 5.0} if scores and step % 10 == 0 else {})


def test_a_real_run_is_drawn_beside_nothing_that_does_not_fit(tiny_overrides, tmp_path, capsys):
    Trainer(config.load(None, tiny_overrides)).fit()
    run = tmp_path / "run"
    plot.main([str(run)])
    with Image.open(run / "curves.png") as image:
        colours = {pixel for _, pixel in image.convert("RGB").getcolors(2**20)}
        assert image.width > 600
    assert (0x2F, 0x5D, 0x9B) in colours, "the run's line"
    assert (0x3C, 0x43, 0x50) not in colours, "no reference is of these latents"
    assert f"wrote {run / 'curves.png'}" in capsys.readouterr().out


def drawn(tmp_path, *argv):
    """Returns the comments of the SVG that a command draws: every text that it shows."""
    path = tmp_path / "figure.svg"
    plot.main([*map(str, argv), "--output", str(path)])
    return [line.strip() for line in path.read_text().splitlines() if line.strip().startswith("<!--")]


def test_runs_stand_side_by_side_with_their_ends_named(tmp_path):
    one = make_run(tmp_path / "one", falling())
    two = make_run(tmp_path / "two", falling(20))
    shown = drawn(tmp_path, one, two, "--metric", "loss,lr")
    tail = [1 / step + 0.2 for step in range(36, 41)]
    assert f"<!-- one: {sum(tail) / len(tail):.4g} -->" in shown
    assert any(line.startswith("<!-- two: 0.25") for line in shown)
    assert {"<!-- loss -->", "<!-- lr -->", "<!-- images seen -->"} <= set(shown)


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path):
    paths = [make_run(tmp_path / folder / "run", falling()) for folder in ("a", "b")]
    shown = " ".join(drawn(tmp_path, *paths))
    assert all(f"<!-- {path}: " in shown for path in paths)


def test_scores_within_training_get_panels_of_their_own(tmp_path):
    run = make_run(tmp_path / "run", falling(scores=True))
    shown = drawn(tmp_path, run)
    assert {"<!-- loss -->", "<!-- fid_200 -->", "<!-- fd_digits_200 -->"} <= set(shown)
    assert "<!-- run: 2.25 -->" in shown, "the last score, not a mean"


def test_scores_are_what_the_records_list_or_in_older_runs_what_is_named_like_one(tmp_path):
    older = [{"step": 1, "images_seen": 8, "loss": 1.0, "sfd_8": 2.0, "kd_8": 3.0, "gap": 4.0}]
    assert read_run(make_run(tmp_path / "older", older)).scores == ["sfd_8", "kd_8"]
    listed = [older[0] | {"images_seen": 16, "scores": ["gap"]}]
    run = make_run(tmp_path / "run", [*older, *listed])
    assert read_run(run).scores == ["gap"]
    shown = drawn(tmp_path, run)
    assert "<!-- gap -->" in shown
    assert "<!-- sfd_8 -->" not in shown
    path = tmp_path / "reference.json"
    plot.main([str(run), "--write-reference", str(path)])
    assert read_reference(path).scores == ["gap"]
    assert "<!-- reference, reference: 4 -->" not in shown


def test_a_single_point_of_a_loss_is_marked(tmp_path):
    run = make_run(tmp_path / "one", falling(1))
    drawn(tmp_path, run)
    assert "<use " in (tmp_path / "figure.svg").read_text().split("<!-- loss -->")[0].split("clip-path")[-1]


def test_every_shipped_reference_is_of_its_preset_and_is_drawn_beside_its_runs(tmp_path):
    reference = read_reference(Path(digits.__file__).parent / SHIPPED_CURVES / "digits.json")
    resolved = yaml.safe_load(to_yaml(config.load()))
    assert holds(resolved, reference.task), "the preset has changed: make the reference again"
    images = resolved["training"]["steps"] * resolved["training"]["global_batch_size"]
    assert reference.curves["loss"][-1][0] == images
    task = {key: resolved[key] for key in ("data", "latents", "flow")}
    mine = make_run(tmp_path / "mine", falling(), **task, model={"depth": 9})
    other = make_run(tmp_path / "other", falling(), **task | {"data": {"name": "shards"}})
    assert any(line.startswith("<!-- digits, reference: 0.24") for line in drawn(tmp_path, mine, other))
    assert not any("reference" in line for line in drawn(tmp_path, other))
    assert not any("reference" in line for line in drawn(tmp_path, mine, "--reference", "none"))


def test_a_reference_is_the_run_it_was_made_from_thinned(tmp_path, capsys):
    run = make_run(tmp_path / "long", falling(950, scores=True), data={"name": "x"})
    path = tmp_path / "new" / "long.json"
    plot.main([str(run), "--write-reference", str(path)])
    reference, whole = read_reference(path), read_run(run)
    assert reference.task == {"data": {"name": "x"}}
    assert reference.curves.keys() == {"loss", "fid_200", "fd_digits_200"}
    assert len(reference.curves["loss"]) == 95
    assert reference.curves["fid_200"] == [
        (x, pytest.approx(y, rel=1e-4)) for x, y in whole.curves["fid_200"]
    ]
    means = [
        sum(value for _, value in curve) / len(curve)
        for curve in (whole.curves["loss"], reference.curves["loss"])
    ]
    assert means[0] == pytest.approx(means[1], rel=1e-3)
    assert any("long, reference" in line for line in drawn(tmp_path, run, "--reference", path))


def test_smoothing_keeps_lines_and_steep_beginnings_and_flattens_noise():
    constant = [(float(x), 3.0) for x in range(1, 50)]
    assert [value for _, value in smooth(constant, 0.1)] == pytest.approx([3.0] * 49)
    noisy = [(float(x), 1.0 + (-1) ** x) for x in range(1, 400)]
    middle = [value for images, value in smooth(noisy, 0.05) if images > 100]
    assert max(middle) - min(middle) < 0.1
    steep = [(float(x), 1 / x) for x in range(1, 400)]
    assert smooth(steep, 0.05)[1][1] == pytest.approx(0.5, rel=0.01)
    assert smooth(noisy, 0) == noisy
    assert [images for images, _ in smooth(noisy, 0.05)] == [images for images, _ in noisy]


def test_smoothing_is_a_mean_under_the_kernel():
    curve = [(1000.0, 1.0), (1010.0, 4.0), (1040.0, 2.0)]
    length = 0.5 * 40
    for place, (images, value) in enumerate(smooth(curve, 0.5)):
        weights = [math.exp(-abs(x - curve[place][0]) / length) for x, _ in curve]
        expected = sum(w * y for w, (_, y) in zip(weights, curve, strict=True)) / sum(weights)
        assert (images, value) == (curve[place][0], pytest.approx(expected))


def test_thinning_keeps_short_curves():
    curve = [(float(x), x / 7) for x in range(10)]
    assert thin(curve, 100) == [(x, pytest.approx(y, rel=1e-4)) for x, y in curve]


def test_steps_without_a_loss_and_a_line_cut_short_are_passed_over(tmp_path):
    run = make_run(
        tmp_path / "run", [{"step": 1, "images_seen": 8, "loss": 2.0}, {"step": 2, "images_seen": 16}]
    )
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "images_seen": 24, "loss": NaN}\n{"step": 4, "imag')
    assert read_run(run).curves["loss"] == [(8.0, 2.0)]
    assert read_run(run).curves["images_seen"] == [(8.0, 8.0), (16.0, 16.0), (24.0, 24.0)]
    assert drawn(tmp_path, run), "one point is a curve too"


def test_what_cannot_be_drawn_is_one_sentence(tmp_path, exit_message):
    run = make_run(tmp_path / "run", falling())
    absent = tmp_path / "absent"
    assert f"must be a folder that holds metrics.jsonl, got {absent}" in exit_message(plot, run, absent)
    assert "unknown metric 'los'; did you mean 'loss'?" in exit_message(plot, run, "--metric", "los")
    assert "--output must end in .png, .svg, .pdf, got" in exit_message(plot, run, "--output", "figure.bmp2")
    assert "--smoothing must be from 0 to 1, got 2.0" in exit_message(plot, run, "--smoothing", 2)
    (tmp_path / "bad.json").write_text("[1]")
    message = exit_message(plot, run, "--reference", tmp_path / "bad.json")
    assert "a reference must be a file of --write-reference" in message
    (run / "metrics.jsonl").write_text("")
    assert "a run must have logged before it can be drawn" in exit_message(plot, run)


def test_a_line_that_is_no_record_is_named_and_the_others_are_drawn(tmp_path, caplog):
    run = make_run(tmp_path / "run", falling())
    good = {"step": 1, "images_seen": 8, "loss": 1.0}
    lines = [json.dumps(good), '{"step": 2}', "\0\0", "[1]", json.dumps(good | {"images_seen": 16})]
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert read_run(run).curves["loss"] == [(8.0, 1.0), (16.0, 1.0)]
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        f"line {number} is no record with images_seen and is left out" for number in (2, 3, 4)
    ]


def test_references_need_the_same_task():
    assert shipped_references([]) == []
    assert holds({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}})
    assert not holds({"a": {"b": 1}}, {"a": {"b": 2}})
    assert not holds({"a": {}}, {"a": {"b": 1}})


def test_losses_are_smoothed_and_scores_are_not(tmp_path, monkeypatch):
    shares = {}

    def record(curve, share):
        shares[curve[0][1]] = share
        return curve

    monkeypatch.setattr(plot, "smooth", record)
    drawn(tmp_path, make_run(tmp_path / "run", falling(scores=True)), "--smoothing", "0.2")
    assert shares == {1.2: 0.2, 9.0: 0.0, 5.0: 0.0}, "by the first value of loss, fid and fd"
