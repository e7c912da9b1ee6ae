"""Which extractor does a reference's file name, and is it found again?"""

from pathlib import Path

import numpy as np
import pytest

from flashdit.commands import evaluate as command
from flashdit.digits.reference import DigitsSource
from flashdit.evaluation.features.extractors import build_extractor
from flashdit.evaluation.reference import write_reference
from flashdit.evaluation.stored import extractor_of


def written(path, *, leave_out=(), **changes):
    """Writes the digits' reference, then again with other words about itself."""
    write_reference(DigitsSource("held-out"), build_extractor("digits"), path, num_images=4)
    with np.load(path) as arrays:
        content = {key: arrays[key] for key in arrays.files if key not in leave_out}
    np.savez(path, **content | changes)
    return str(path)


def test_a_file_names_its_extractor_and_one_made_before_too(tmp_path):
    assert extractor_of(written(tmp_path / "new.npz")) == ("digits", None)
    old = written(tmp_path / "old.npz", leave_out=("extractor_spec", "extractor_weights"))
    assert extractor_of(old) == ("digits", None)
    weights = tmp_path / "w.pth"
    weights.touch()
    named = written(tmp_path / "named.npz", extractor_spec="timm/x", extractor_weights=str(weights))
    assert extractor_of(named) == ("timm/x", str(weights))
    np.savez(tmp_path / "adm.npz", mu=np.ones(3), sigma=np.eye(3))
    assert extractor_of(str(tmp_path / "adm.npz")) == ("inception", None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extractor_spec": "/absent/run"}, r"with extractor 'digits', of /absent/run, which is not there"),
        ({"extractor_weights": "/absent/w.pth"}, r"of /absent/w\.pth, which is not there: give it by --ext"),
        ({"extractor_spec": "os:getcwd"}, r"with extractor 'digits' \(os:getcwd\): give it by --extractor"),
        ({"extractor_spec": "classifier"}, r"with extractor 'digits': give it by --extractor"),
    ],
)
def test_one_that_only_its_user_can_point_to_is_asked_for(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        extractor_of(written(tmp_path / "r.npz", **changes))


def test_what_is_built_is_known_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert build_extractor("digits").built_as == ("digits", None)


def test_a_reference_scores_without_naming_its_extractor_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["flashdit eval"])
    path = written(tmp_path / "r.npz")
    command.main(["--samples", path, "--reference", path, "--metrics", "fid", "--output", str(tmp_path)])
    assert "extractor digits" in capsys.readouterr().out


def test_errors_are_headed_by_the_command_that_was_typed(tmp_path, monkeypatch, exit_message):
    for typed in ("flashdit eval", "/some/where/eval_fid.py"):
        monkeypatch.setattr("sys.argv", [typed])
        said = exit_message(command, "make-reference", tmp_path / "absent", tmp_path / "r.npz")
        assert said.startswith(f"{Path(typed).name} make-reference: error: a reference must be a data set")
