"""eval_fid.py as a user runs it; in this process but where the exit status matters."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from flashdit.commands import evaluate as eval_fid
from flashdit.digits.images import DIGIT_NAMES, digits
from flashdit.evaluation.features import statistics
from flashdit.evaluation.features.extractor import EXTRACTORS
from flashdit.evaluation.metrics.metric import METRICS
from flashdit.sampling.options import SamplingOptions

FLOOR = {"fd": 0.1617, "sfd": 2.264, "precision": 0.9165, "recall": 0.875}  # of the committed classifier
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

    num_classes, class_names, data_spec, images_path, guide = 10, DIGIT_NAMES, "digits", None, None
    sampling = SamplingOptions()
    vae = SimpleNamespace(config={"block_out_channels": (8, 16)})
    space = SimpleNamespace(
        need_vae=lambda: StandInGenerator.vae, mean=torch.zeros(1), std=torch.ones(1), options=""
    )

    def __init__(self, run_dir: Path):
        self.run_dir, self.drawn = run_dir, 0

    def check_guidance(self, options) -> None:
        """It was trained with dropped labels, as it were."""

    def recipe(self) -> dict:
        return {"checkpoint": "stand-in", "step": 7, "weights_sha256": "5" * 64}

    def evaluations(self, options) -> int:
        return options.nfe

    def image_size(self, options) -> tuple[int, int]:
        return 32, 32

    def check_batch_fits(self, options, count) -> None:
        """It fits."""

    def generate(self, labels, options, ids=None):
        images, known = digits("train")
        rows = torch.stack([(known == label).nonzero()[place % 100, 0] for place, label in enumerate(labels)])
        for batch in (torch.arange(len(labels)) if ids is None else ids).split(options.batch_size):
            self.drawn += len(batch)
            yield SimpleNamespace(images=images[rows[batch]], labels=labels[batch], ids=batch)


@pytest.fixture
def generator(tmp_path, monkeypatch) -> StandInGenerator:
    stand_in = StandInGenerator(tmp_path / "run")
    monkeypatch.setattr(eval_fid, "open_generator", lambda arguments: stand_in)
    return stand_in


def test_samples_against_digits_come_with_their_floors(main, samples, tmp_path, capsys):
    main(["--samples", str(samples), "--reference", "digits", "--output", str(tmp_path / "eval")])
    content = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    metrics, floor = content["metrics"], content["floor"]
    bare = {"is_mean", "is_std", "precision", "recall", "accuracy"}
    assert set(metrics) == bare | {"fd_120", "sfd_120"}
    assert set(floor) == bare | {"fd_1437", "sfd_1437"}
    assert metrics["accuracy"] == 1.0
    assert floor["accuracy"] >= 0.99
    assert floor["fd_1437"] == pytest.approx(FLOOR["fd"], rel=0.03)
    assert floor["sfd_1437"] == pytest.approx(FLOOR["sfd"], rel=0.03)
    assert floor["precision"] == pytest.approx(FLOOR["precision"], abs=0.01)
    assert floor["recall"] == pytest.approx(FLOOR["recall"], abs=0.01)
    assert floor["fd_1437"] < metrics["fd_120"]
    assert content["reference"]["name"] == "digits"
    assert content["reference"]["num_images"] == 360
    assert len(content["reference"]["sha256"]) == len(content["extractor"]["weights_sha256"]) == 64
    assert content["samples"]["labels"] == "not balanced"
    assert content["image_size"] == [32, 32]
    assert content["processes"] == 1
    assert set(content["timings_s"]) == {"reference", "samples", "metrics"}
    assert "FD[digits]" in (tmp_path / "eval" / "metrics.md").read_text()
    assert "floor: real train" in capsys.readouterr().out


def test_default_output_lies_beside_the_samples(main, samples):
    main(["--samples", str(samples), "--reference", "digits", "--metrics", "fid", "--num-images", "70"])
    content = json.loads((samples.parent / "samples.metrics.json").read_text())
    assert list(content["metrics"]) == ["fd_70"]
    assert content["num_images"] == 70


def test_checkpoint_is_sampled_and_its_recipe_recorded_in_the_run(main, generator, capsys):
    main(["--num-images", "130", "--steps", "9", "--cfg-scale", "1.5", "--cfg-interval", "0.1", "0.9"])
    content = json.loads((generator.run_dir / "eval" / "metrics.json").read_text())
    assert generator.drawn == content["num_images"] == 130
    assert content["samples"]["checkpoint"] == "stand-in"
    assert content["samples"]["nfe"] == 17
    assert content["samples"]["sampling"]["cfg_interval"] == [0.1, 0.9]
    assert content["samples"]["sampling"]["cfg_scale"] == 1.5
    assert content["metrics"]["accuracy"] >= 0.98


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "fid,recal"], "unknown metric 'recal'; did you mean 'recall'"),
        (["--extractor", "runs/nix"], "a known name or a run's folder, runs/nix does not exist"),
        (["--extractor", "incepton"], "unknown extractor 'incepton'; did you mean 'inception'"),
        (
            ["--reference", "absent.npz", "--extractor", "digits"],
            "a reference must be a data set that brings one, an existing npz",
        ),
        (["--extractor", "inception", "--inception-weights", "absent.pth"], r"no file absent\.pth"),
        (["--num-images", "0"], "the number of images must be positive, got 0"),
        (["--sampler", "eulr"], "unknown sampler 'eulr'"),
        (["--num-images", "3"], "at least 4 images on each side"),
        (["--samples", "a.npz", "--labels", "random"], "--labels is for sampling from a --checkpoint"),
        (["--extractor-weights", "w.pth"], "unknown option of extractor 'digits' 'weights'"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--samples", "a.npz", "--checkpoint", "b"], r"give --samples or --checkpoint, got a\.npz and b"),
        (["--samples", "a.npz", "--compile"], "--compile is for sampling from a --checkpoint"),
        (["--samples", "a.npz", "--cfg-scale", "2"], "--cfg-scale is for sampling from a --checkpoint"),
        (["--samples", "a.npz"], "requires a reference, --reference or evaluation.reference"),
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
    generator.data_spec = "shards"
    with pytest.raises(
        ValueError,
        match=r"requires a reference, --reference or evaluation\.reference.*data set 'shards' brings none",
    ):
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


def test_inception_against_stored_statistics_without_spatial_ones(
    main, inception_weights, samples, tmp_path, monkeypatch
):
    monkeypatch.setattr(statistics, "FORWARD_ROWS", 5)  # as many as there are: the rest would be black images
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
    assert content["metrics"]["fid_5"] == pytest.approx(
        trace, rel=1e-4
    )  # equal means, and one set is a point
    assert content["metrics"]["sfid_5"] is None
    assert content["reasons"]["sfid_5"] == "'reference.npz' has no spatial statistics"
    assert content["reasons"]["precision"] == "'reference.npz' has no images, only statistics"
    assert content["metrics"]["is_mean"] >= 1
    assert content["floor"] is None
    assert "accuracy" not in content["metrics"]
    assert any("not the published" in warning for warning in content["warnings"])
    assert any("rank-deficient in 2048" in warning for warning in content["warnings"])


def test_the_second_time_nothing_is_drawn_and_without_the_cache_everything(main, generator, tmp_path):
    arguments = ["--num-images", "60", "--metrics", "fid,accuracy", "--output", str(tmp_path / "r.json")]
    results = []
    for extra in ([], ["--batch-size", "7"], ["--no-cache"], ["--cfg-scale", "2"], ["--labels", "random"]):
        main([*arguments, *extra])
        results.append((generator.drawn, json.loads((tmp_path / "r.json").read_text())))
    assert [drawn for drawn, _ in results] == [60, 60, 120, 180, 240]
    assert results[0][1]["metrics"] == results[1][1]["metrics"] == results[2][1]["metrics"]
    assert results[3][1]["metrics"] == results[0][1]["metrics"], "the stand-in knows no guidance"
    assert results[4][1]["metrics"]["fd_60"] != results[0][1]["metrics"]["fd_60"]
    assert [result["samples"]["labels"] for _, result in results[3:]] == ["balanced", "random"]


def test_every_metric_can_be_asked_for_and_told_in_a_table(main, samples, tmp_path):
    arguments = ["--samples", str(samples), "--reference", "digits", "--output", str(tmp_path / "r.json")]
    for name in METRICS.names():
        main([*arguments, "--metrics", name, "--csv", str(tmp_path / "all.csv")])
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 1 + len(METRICS.names())
    main([*arguments, "--metrics", "kid"])
    assert set(json.loads((tmp_path / "r.json").read_text())["metrics"]) == {"kd_120", "kd_std_120"}


def test_a_written_reference_scores_as_its_images_do(main, samples, tmp_path):
    main(["make-reference", "digits", str(tmp_path / "digits.npz"), "--batch-size", "11"])
    for name, reference in (("direct", "digits"), ("written", str(tmp_path / "digits.npz"))):
        words = [
            "--reference",
            reference,
            "--extractor",
            "digits",
            "--output",
            str(tmp_path / f"{name}.json"),
        ]
        main(["--samples", str(samples), *words])
    direct, written = (json.loads((tmp_path / name).read_text()) for name in ("direct.json", "written.json"))
    assert direct["metrics"] == written["metrics"]


def bad_folder(path: Path, kind: str) -> None:
    path.mkdir()
    image = Image.new("RGB", (32, 32))
    for number in range(0 if kind == "empty" else 6):
        image.save(path / f"{number}.png")
    if kind == "mixed":
        Image.new("RGB", (32, 30)).save(path / "5.png")
    if kind == "unreadable":
        (path / "5.png").write_bytes((path / "4.png").read_bytes()[:50])


def bad_npz(path: Path, kind: str) -> None:
    shape = {"channels first": (6, 3, 32, 32), "few": (3, 32, 32, 3), "large": (6, 64, 32, 3)}.get(
        kind, (6, 32, 32, 3)
    )
    np.savez(path, np.zeros(shape, np.float32 if kind == "float" else np.uint8))
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", "a folder of images must hold images .*, got none in .*samples"),
        ("mixed", r"images of a folder must have one size, got 32×32 and 32×30 \(.*0\.png and .*5\.png\)"),
        ("unreadable", r"every image must be readable, .*5\.png is not"),
        ("float", r"arr_0 must be uint8 \(n, h, w, 3\) in C order with n ≥ 1, got float32"),
        ("channels first", r"arr_0 must be uint8 .*, got uint8 \(6, 3, 32, 32\)"),
        ("truncated", r"samples must be an npz with images in arr_0, got .*samples\.npz"),
        ("few", "these metrics need at least 4 images on each side, got 3 of the samples"),
        ("large", r"must be images of one size \(h×w\), got 64×32 and 32×32"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2_and_nothing_is_written(kind, message, tmp_path, exit_message):
    is_folder = kind in ("empty", "mixed", "unreadable")
    path = tmp_path / ("samples" if is_folder else "samples.npz")
    (bad_folder if is_folder else bad_npz)(path, kind)
    output = tmp_path / "eval" / "metrics.json"
    table = tmp_path / "scores.csv"
    said = exit_message(
        eval_fid, "--samples", path, "--reference", "digits", "--output", output, "--csv", table
    )
    assert re.search(message, said), said
    assert not output.parent.exists()
    assert not table.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["make-reference", "absent", "r.npz"],
            "a reference must be a data set that brings one, .* got absent",
        ),
        (["make-reference", "digits", "r.json"], r"must be written to an \.npz file, got r\.json"),
        (["make-reference", "digits", "r.npz", "--num-images", "0"], "must keep at least 1 image, got 0"),
        (
            ["make-reference", "digits", "r.npz", "--batch-size", "0"],
            "the batch size must be positive, got 0",
        ),
        (["make-reference", "digits", "r.npz", "--extractor", "vgg"], "unknown extractor 'vgg'; did you"),
    ],
)
def test_a_reference_that_cannot_be_made_is_refused(main, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        main(words)
    assert not list(tmp_path.glob("r.*"))


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
