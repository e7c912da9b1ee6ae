"""The study's arithmetic, its controls, that a killed run goes on as if nothing had been, and its report."""

import json
from dataclasses import replace

import pytest

from benchmarks import attention_study
from benchmarks.attention_kinds import BASELINE, KINDS, SIZES, model_arguments, register_convolution
from benchmarks.attention_pieces import Pieces, Run, cost, expected, next_rate, plan, points_of, this_machine
from benchmarks.attention_report import comparison, mean_curve, steps_in, value_at, write_report
from benchmarks.attention_study import Study
from flashdit.memory import model_without_memory
from flashdit.models.attention import ATTENTIONS
from flashdit.shared.runs import list_checkpoints

TINY = {16: replace(SIZES[16], steps=9, batch=2, rounds=1, kinds=(BASELINE, "convolution_sincos"))}
RUN = Run(side=16, kind="convolution_sincos", seed=0)


@pytest.fixture(autouse=True)
def convolution():
    """Makes the control an attention kind, for these tests alone."""
    register_convolution()
    yield
    del ATTENTIONS.entries["convolution"]


def timing(**seconds):
    kinds = {
        kind: {"step": {"median_s": taken, "min_s": taken, "max_s": taken, "times_as_fast": 1.0}}
        | {"images_per_s": 100.0, "trained_parameters": 5, "multiply_adds": 7, "peak_memory_gib": 0.1}
        for kind, taken in seconds.items()
    }
    return {"machine": {"processor": "Abacus", "load_before": 0.0}, "batch": 2, "kinds": kinds}


@pytest.fixture
def make_study(tmp_path, monkeypatch):
    """Returns a function that makes a study of its own: timed, and without samples."""
    monkeypatch.setattr(attention_study, "LOSS_IMAGES", 26)
    monkeypatch.setattr(attention_study, "SAMPLED_FROM", 100)

    def make(name):
        study = Study(Pieces(folder=tmp_path / name, sizes=TINY), tmp_path / f"{name}_work")
        found = timing(**{BASELINE: 0.3, "convolution_sincos": 0.2})
        study.pieces.write(f"timing_16_{this_machine()}", found)
        return study

    return make


@pytest.mark.parametrize("side", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_parameters_of_iwin_with_the_same_positions(side, kind):
    def trained(name):
        arguments = model_arguments(SIZES[side], name)
        return sum(p.numel() for p in model_without_memory(arguments).parameters() if p.requires_grad)

    # LightningDiT lacks four convolutions of 640, registers are 256 more, the wider MLP is 44 more a block.
    assert trained(kind) == pytest.approx(trained("iwin4"), rel=0.01)
    if kind.startswith("convolution"):
        assert trained(kind) - trained("iwin4") == 4 * 44


def test_a_kind_is_scored_at_parts_of_the_budget_of_steps_and_where_its_time_ends():
    points = points_of({BASELINE: 0.3, "faster": 0.2, "slower": 0.6}, 60)
    assert points[BASELINE] == [10, 20, 40, 60]
    assert points["faster"] == [10, 20, 40, 60, 90]
    # Its time ends at 30, and it is trained to the budget of steps.
    assert points["slower"] == [10, 20, 30, 40, 60]


def test_rates_are_tried_until_the_best_has_worse_ones_on_both_sides():
    losses = {}
    for rate, loss in ((0.003, 5.0), (0.006, 4.0), (0.012, 3.0), (0.024, 2.0), (0.048, 6.0)):
        assert next_rate(losses) == rate
        losses[f"{rate:g}"] = loss
    assert next_rate(losses) is None
    assert next_rate({"0.003": 1.0, "0.006": 2.0, "0.012": 3.0}) == 0.0015


def test_equal_time_is_read_between_points_by_the_logarithm_of_the_step():
    assert steps_in(0.2, 0.3, 80) == pytest.approx(120)
    halving = [(10, 3.0), (40, 1.0)]
    assert value_at(halving, 20) == pytest.approx(2.0)
    assert value_at(halving, 10.4) == 3.0
    assert value_at(halving, 40.6) is None
    assert value_at(halving, 9) is None
    assert mean_curve([[(1, 2.0), (2, 4.0)], [(2, 6.0)], []]) == [(2, 5.0)]


def test_a_killed_run_goes_on_as_if_nothing_had_been_and_only_what_lacks_is_made(make_study):
    whole, killed = make_study("whole"), make_study("killed")
    whole.make_run(RUN)
    made, rates = whole.pieces.read(RUN.name), whole.pieces.read(f"rate_{RUN.kind}")
    losses = rates["losses"]
    assert made["rate"] == float(min(losses, key=lambda rate: losses[rate]))
    assert next_rate(losses) is None

    killed.pieces.write(f"rate_{RUN.kind}", rates)
    first = dict(list(made["points"].items())[:2])
    killed.pieces.write(RUN.name, made | {"points": first})
    killed.train(RUN, made["rate"], 5)  # dies here, between two points
    killed = Study(killed.pieces, killed.work)
    assert not killed.pieces.is_made(RUN)
    killed.make_run(RUN)
    assert killed.pieces.is_made(RUN)
    points = killed.pieces.read(RUN.name)["points"]
    assert list(points) == ["2", "3", "6", "9", "13"]
    for step, point in made["points"].items():
        assert points[step]["loss"] == point["loss"], step
    assert {step: points[step] for step in first} == first
    (checkpoint,) = list_checkpoints(killed.work / f"16_{RUN.kind}_{made['rate']:g}_seed0")
    assert checkpoint.name == "step_00000013"


def test_the_plan_counts_what_is_left_and_guesses_what_is_not_timed(tmp_path):
    pieces = Pieces(folder=tmp_path, sizes=TINY | {32: replace(SIZES[32], kinds=(BASELINE,))})
    known = timing(**{BASELINE: 36.0, "convolution_sincos": 36.0})
    # 9 steps of 36 s; 4 points of 2,080 evaluations, 1 of them of 13,000 more; 100 a second
    assert cost(pieces, Run(side=16, kind=BASELINE, seed=0), known) == pytest.approx(9 * 36 + 4 * 20.8 + 130)
    text = plan(pieces, {16: known})
    pieces.write(Run(side=16, kind=BASELINE, seed=1).name, {"points": {"2": {}, "3": {}}})
    assert cost(pieces, Run(side=16, kind=BASELINE, seed=1), known) == pytest.approx(6 * 36 + 2 * 20.8 + 130)
    assert "16² tokens, seed 1: 0 of 2 runs made" in text
    assert "32² tokens, seed 0: 0 of 1 runs made" in text
    assert "not timed" in text
    pieces.write(Run(side=16, kind=BASELINE, seed=0).name, {"points": {"2": {}, "3": {}, "6": {}, "9": {}}})
    assert cost(pieces, Run(side=16, kind=BASELINE, seed=0), known) == 0
    guess = expected(
        known | {"kinds": {BASELINE: known["kinds"][BASELINE] | {"multiply_adds": 10**8}}}, SIZES[16]
    )
    per_mac = guess["kinds"]["iwin4"]["step"]["median_s"] / guess["kinds"][BASELINE]["step"]["median_s"]
    assert 0.6 < per_mac < 0.7, "54.6 of 85.5 million"


def test_the_report_is_made_of_the_pieces_alone_and_names_what_lacks(tmp_path):
    pieces = Pieces(folder=tmp_path / "pieces", sizes=TINY)
    with pytest.raises(ValueError, match=r"a report requires a piece of the study, .*pieces has none"):
        write_report(pieces, tmp_path / "report.md", tmp_path / "figure.png")
    pieces.write("timing_16_Abacus", timing(**{BASELINE: 0.3, "convolution_sincos": 0.2}))
    points = points_of({BASELINE: 0.3, "convolution_sincos": 0.2}, 9)
    pieces.write("points_16", {"processor": "Abacus", "points": points})
    scores = {"fid": 3.0, "precision": 0.5, "recall": 0.25, "accuracy": 0.75}
    for seed, kind, value in ((0, BASELINE, 0.5), (0, RUN.kind, 0.25), (1, RUN.kind, 0.75)):
        made = {
            str(step): {"loss": {"held-out": value, "families": value / step}}
            | ({"scores": scores, "floor": {"fid": 1.5}} if step >= 9 else {})
            for step in points[kind]
        }
        pieces.write(f"run_16_{kind}_seed{seed}", {"kind": kind, "seed": seed, "rate": 0.003, "points": made})
    write_report(pieces, tmp_path / "report.md", tmp_path / "figure.png")
    text = (tmp_path / "report.md").read_text()
    assert f"16² tokens, seed 1: 1 of 2 runs; not made: {KINDS[BASELINE].label}\n" in text
    table = comparison(pieces, TINY[16], pieces.timings(16)["Abacus"])
    assert (
        "| 13 | 0.5000 (0.2500–0.7500) | 0.0385 (0.0192–0.0577) | 3.00 (3.00–3.00) | 2.0 (2.0–2.0) |" in table
    )
    assert "| 9 | 0.5000 (one seed) | 0.0556 (one seed) |" in table
    assert "| 9 | 0.5000 (0.2500–0.7500) |" in comparison(pieces, TINY[16])
    assert text.count("| 0.003 |") == 4 + 5 + 5, "every point of every run"
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((pieces.folder / "points_16.json").read_text())["processor"] == "Abacus"
