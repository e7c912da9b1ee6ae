"""eval_fid.py as a user runs it; in this process but where the exit status matters."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval_fid
from flashdit.data.digits import CLASS_NAMES, digits
from flashdit.evaluation.features import EXTRACTORS
from flashdit.generate import SamplingOptions

SCRIPT = Path(__file__).parents[3] / "eval_fid.py"


@pytest.fixture(scope="module")
def main():
    return eval_fid.main


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    """120 training digits with their labels."""
    images, labels = digits("train")
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    np.savez(path, images[:120].permute(0, 2, 3, 1).numpy(), labels[:120].numpy())
    return path


class StandInGenerator:
    """Gives a training digit of the class that is asked for."""

    num_classes, class_names, data_name = 10, CLASS_NAMES, "digits"
    sampling = SamplingOptions()
    space = SimpleNamespace(need_vae=lambda: None)

    def __init__(self, run_dir: Path):
        self.run_dir, self.drawn = run_dir, 0

    def recipe(self) -> dict:
        return {"checkpoint": "stand-in", "step": 7}

    def nfe(self, options) -> int:
        return 2 * options.steps

    def generate(self, labels, options):
        images, known = digits("train")
        rows = torch.stack([(known == label).nonzero()[place % 100, 0] for place, label in enumerate(labels)])
        for ids in torch.arange(len(labels)).split(options.batch_size):
            self.drawn += len(ids)
            yield SimpleNamespace(images=images[rows[ids]], labels=labels[ids], ids=ids)


@pytest.fixture
def generator(tmp_path, monkeypatch) -> StandInGenerator:
    stand_in = StandInGenerator(tmp_path / "run")
    monkeypatch.setattr(eval_fid, "load_generator", lambda checkpoint, device, vae: stand_in)
    return stand_in


def test_samples_against_digits_come_with_their_floors(main, samples, tmp_path, capsys):
    main(["--samples", str(samples), "--reference", "digits", "--output", str(tmp_path / "eval")])
    content = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    names = {"fd", "sfd", "is_mean", "is_std", "precision", "recall", "accuracy"}
    assert set(content["metrics"]) == set(content["floor"]) == names
    assert content["metrics"]["accuracy"] == 1.0
    assert content["floor"]["accuracy"] >= 0.98
    assert content["floor"]["fd"] == pytest.approx(0.1364, abs=0.005)
    assert content["floor"]["sfd"] == pytest.approx(0.400, abs=0.01)
    assert content["floor"]["precision"] == pytest.approx(0.931, abs=0.01)
    assert content["floor"]["recall"] == pytest.approx(0.858, abs=0.01)
    assert content["floor"]["fd"] < content["metrics"]["fd"]
    assert content["reference"] == {"name": "digits", "num_images": 360}
    assert "FD[digits]" in (tmp_path / "eval" / "metrics.md").read_text()
    assert "floor: real train" in capsys.readouterr().out


def test_default_output_lies_beside_the_samples(main, samples):
    main(["--samples", str(samples), "--reference", "digits", "--metrics", "fid", "--num-images", "70"])
    content = json.loads((samples.parent / "samples.metrics.json").read_text())
    assert list(content["metrics"]) == ["fd"]
    assert content["num_images"] == 70


def test_checkpoint_is_sampled_and_its_recipe_recorded_in_the_run(main, generator, capsys):
    main(["--num-images", "130", "--steps", "9", "--cfg-scale", "1.5", "--cfg-interval", "0.1", "0.9"])
    content = json.loads((generator.run_dir / "eval" / "metrics.json").read_text())
    assert generator.drawn == content["num_images"] == 130
    assert content["samples"]["checkpoint"] == "stand-in"
    assert content["samples"]["nfe"] == 18
    assert content["samples"]["sampling"]["cfg_interval"] == [0.1, 0.9]
    assert content["samples"]["sampling"]["cfg_scale"] == 1.5
    assert content["metrics"]["accuracy"] >= 0.98


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "fid,recal"], "unknown metric 'recal'; did you mean 'recall'"),
        (["--extractor", "incepton"], "unknown extractor 'incepton'; did you mean 'inception'"),
        (
            ["--reference", "absent.npz", "--extractor", "digits"],
            "a reference must be 'digits', an existing npz",
        ),
        (["--extractor", "inception", "--inception-weights", "absent.pth"], r"no file absent\.pth"),
        (["--num-images", "0"], "--num-images must be positive, got 0"),
        (["--sampler", "eulr"], "unknown sampler 'eulr'"),
        (["--num-images", "3"], "at least 4 images on each side"),
        (["--batch-size", "0"], "--batch-size must be positive, got 0"),
        (["--samples", "a.npz", "--checkpoint", "b"], r"give --samples or --checkpoint, got a\.npz and b"),
        (["--samples", "a.npz", "--cfg-scale", "2"], "--cfg-scale is for sampling from a --checkpoint"),
        (["--samples", "a.npz"], "this needs a --reference"),
        (["--samples", "absent.npz", "--reference", "digits"], r"an existing npz or folder, got absent\.npz"),
        (["--output", str(SCRIPT)], r"--output must be a folder or a \.json file, got .*eval_fid\.py"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_drawn(main, generator, arguments, message):
    with pytest.raises(ValueError, match=message):
        main(arguments)
    assert generator.drawn == 0
    assert not generator.run_dir.exists()


def test_checkpoint_of_other_classes_has_no_accuracy(main, generator):
    generator.class_names = ["cat", "dog"]
    main(["--num-images", "10", "--metrics", "fid"])
    with pytest.raises(ValueError, match="accuracy needs an extractor of the samples' own classes"):
        main(["--num-images", "10", "--metrics", "accuracy"])


def test_checkpoint_of_other_data_needs_a_reference(main, generator):
    generator.data_name = "shards"
    with pytest.raises(ValueError, match="this needs a --reference"):
        main([])


def test_accuracy_by_inception_is_refused(main, generator, inception_weights):
    with pytest.raises(ValueError, match="accuracy needs an extractor of the samples' own classes"):
        main(
            [
                "--extractor",
                "inception",
                "--inception-weights",
                str(inception_weights),
                "--metrics",
                "accuracy",
            ]
        )


def test_inception_against_stored_statistics_without_spatial_ones(main, inception_weights, samples, tmp_path):
    extractor = EXTRACTORS.build({"name": "inception", "weights": str(inception_weights)})
    mu = extractor(digits("train")[0][:5])["pool"].mean(dim=0).double().numpy()
    np.savez(tmp_path / "reference.npz", mu=mu, sigma=np.zeros((2048, 2048)))
    arguments = [
        "--samples",
        str(samples),
        "--num-images",
        "5",
        "--reference",
        str(tmp_path / "reference.npz"),
    ]
    output = tmp_path / "scores.json"
    main([*arguments, "--inception-weights", str(inception_weights), "--output", str(output)])
    content = json.loads(output.read_text())
    trace = extractor(digits("train")[0][:5])["pool"].double().var(dim=0).sum().item()
    assert content["metrics"]["fid"] == pytest.approx(trace, rel=1e-4)  # equal means, and one set is a point
    assert content["metrics"]["sfid"] is None
    assert content["reasons"]["sfid"] == "'reference.npz' has no spatial statistics"
    assert content["reasons"]["precision"] == "'reference.npz' has no images, only statistics"
    assert content["metrics"]["is_mean"] >= 1
    assert content["floor"] is None
    assert "accuracy" not in content["metrics"]
    assert any("not the published" in warning for warning in content["warnings"])
    assert any("rank-deficient in 2048" in warning for warning in content["warnings"])


def test_a_users_mistake_is_one_line_and_status_2_and_leaves_nothing(tmp_path):
    np.savez(tmp_path / "samples.npz", np.zeros((5, 3, 8, 8), dtype=np.uint8))
    command = [
        sys.executable,
        str(SCRIPT),
        "--samples",
        str(tmp_path / "samples.npz"),
        "--reference",
        "digits",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("eval_fid.py: error: arr_0 must be uint8 (n, h, w, 3)")
    assert done.stderr.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]
