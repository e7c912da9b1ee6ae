import csv
from dataclasses import replace

import pytest

from flashdit.evaluation.metrics.metric import ScoreName
from flashdit.evaluation.metrics.scoring import Scores
from flashdit.evaluation.reports.csv import CSV_COLUMNS, append_csv, read_columns


def rows(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_appended_under_one_header(tmp_path, result_of):
    path = tmp_path / "new" / "scores.csv"
    for fid in (3.5, None):
        append_csv(result_of(Scores(count=360, values={"fid": fid, "precision": 0.25})), path)
    first, second = rows(path)
    assert tuple(first) == CSV_COLUMNS
    assert (first["frechet"], first["precision"], first["recall"]) == ("3.5", "0.25", "")
    assert second["frechet"] == ""
    assert first["extractor"] == "digits"
    assert first["reference_sha256"] == "a" * 64
    assert first["image_size"] == "32×32"


def test_samples_of_a_checkpoint_bring_their_options(tmp_path, result_of):
    sampling = {"sampler": "euler", "steps": 25, "cfg_scale": 1.5, "cfg_interval": (0.2, 1.0), "seed": 3}
    samples = {"source": "checkpoint", "checkpoint": "runs/a", "step": 7, "nfe": 50, "sampling": sampling}
    append_csv(result_of(Scores(count=360, values={"fid": 1.0}), samples=samples), tmp_path / "scores.csv")
    (row,) = rows(tmp_path / "scores.csv")
    assert (row["samples"], row["step"], row["nfe"]) == ("runs/a", "7", "50")
    assert (row["cfg_scale"], row["cfg_interval"], row["seed"]) == ("1.5", "0.2-1", "3")


def test_a_table_of_other_columns_is_refused_and_left_as_it_was(tmp_path, result_of):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"--csv must be a new file or have the columns .* begins with 'a,b"):
        append_csv(result_of(Scores(count=360, values={"fid": 1.0})), path)
    assert path.read_text() == "a,b\n1,2\n"


def test_an_empty_file_is_a_new_one(tmp_path, result_of):
    (tmp_path / "scores.csv").touch()
    assert read_columns(tmp_path / "scores.csv", [], {}) == list(CSV_COLUMNS)
    append_csv(result_of(Scores(count=360, values={"fid": 1.0})), tmp_path / "scores.csv")
    assert len(rows(tmp_path / "scores.csv")) == 1


def test_a_score_of_another_column_adds_it_to_a_new_table_and_is_refused_by_one_without_it(
    tmp_path, result_of
):
    result = result_of(Scores(count=360, values={"fid": 1.0}))
    extra = ScoreName(stem="delta", label="Δ", column="delta", counted=False)
    other = replace(
        result, scores=Scores(count=360, values={"delta": 2.0}), names={"delta": extra, **result.names}
    )
    append_csv(other, tmp_path / "new.csv")
    append_csv(result, tmp_path / "new.csv")
    first, second = rows(tmp_path / "new.csv")
    assert tuple(first) == (*CSV_COLUMNS, "delta")
    assert (first["delta"], second["delta"], second["frechet"]) == ("2.0", "", "1.0")
    append_csv(result, tmp_path / "old.csv")
    before = (tmp_path / "old.csv").read_text()
    with pytest.raises(ValueError, match=r"have a column for every value, .*old\.csv has none for delta"):
        append_csv(other, tmp_path / "old.csv")
    assert (tmp_path / "old.csv").read_text() == before
