import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hard_pictures import READABLE, make_hard_pictures
from PIL import Image

from flashdit import config
from flashdit.commands import budget, new, sample, survey, train
from flashdit.commands.budget import Machine
from flashdit.commands.draft import SCALES, Draft, round_count
from flashdit.data.autoencoders import load_vae
from flashdit.data.fit import DataFacts
from flashdit.data.latents import LatentOptions
from flashdit.data.pixels import Pixels
from flashdit.evaluation.features import inception
from flashdit.models.costs import forward_flops
from flashdit.models.sizes import SIZES
from flashdit.shared import process
from iwin_tasks.classification.config import load_classifier_config


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Works in an empty folder, on a CPU of a known speed, without Inception's weights."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(budget, "matmul_peak", lambda device, dtype: 5e10)
    monkeypatch.setattr(inception.torch.hub, "get_dir", lambda: str(tmp_path / "no_hub"))
    monkeypatch.delenv(inception.WEIGHTS_VARIABLE, raising=False)


def folder_of(root, *sizes, classes=("a", "b")):
    """Writes pictures of these sizes, a class after the other; returns the folder."""
    for place, size in enumerate(sizes):
        path = root / classes[place % len(classes)] / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (place % 256, 90, 30)).save(path)
    return root


def written(capsys, *words):
    """Runs the command; returns the YAML that it wrote and what it printed."""
    new.main([*map(str, words), "--out", "mine.yaml"])
    with open("mine.yaml") as file:
        return yaml.safe_load(file), capsys.readouterr().out


def draft_of(num_images, **options):
    about = {"num_classes": 10, "image_size": 64, "latents": None, "space": Pixels(), "device": "cuda"}
    about |= {"images": "/pictures", "run_dir": "runs/x", "workers": 1}
    return Draft(num_images=num_images, **about | options)


def latent_space(channels, factor):
    return SimpleNamespace(channels=channels, factor=factor, image_side=None)


def test_pictures_that_are_hard_to_read_train_by_the_printed_command_from_another_folder(
    tmp_path, monkeypatch, capsys
):
    make_hard_pictures(tmp_path / "my pics")
    new.main(["--images", "my pics", "--out", "my run.yaml"])
    printed = capsys.readouterr().out
    assert "2 smaller than 32 px were enlarged, formes/small.png 1.6 times" in printed
    lines = [line.strip() for line in printed.splitlines()]
    (command,) = (shlex.split(line) for line in lines if line.startswith("flashdit train"))
    assert command == ["flashdit", "train", "--config", "my run.yaml"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    short = [
        "training.steps=2",
        "training.global_batch_size=4",
        "sampling.steps=1",
        "training.preview_every=0",
    ]
    train.main(["--config", str(tmp_path / "my run.yaml"), *short, "training.workers=0"])
    assert "trained to step 2: runs/my run" in capsys.readouterr().out
    made = config.load(tmp_path / "elsewhere" / "runs" / "my run" / "config.yaml")
    assert made.data["path"] == str(tmp_path / "my pics")
    assert (made.model["num_classes"], made.model["sample_size"], made.flow.prediction) == (3, 32, "data")
    listing = (tmp_path / "elsewhere" / "runs" / "my run" / "images.json").read_text()
    assert len(yaml.safe_load(listing)["images"]) == READABLE


def test_the_next_commands_are_what_a_shell_takes(tmp_path, capsys):
    folder = folder_of(tmp_path / "it's mine", *[(40, 40)] * 6)
    _, printed = written(capsys, "--images", folder, "--name", "first try")
    lines = printed.split("next:\n")[1].splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    run = "runs/first try"
    assert commands[0] == ["flashdit", "train", "--config", "mine.yaml"]
    assert commands[1] == ["flashdit", "sample", "--checkpoint", run]
    assert sample.parse(commands[1][2:]).checkpoint is not None
    assert commands[2][:2] == ["iwin", "classify"]
    assert {f"data.path={folder}", f"run.dir={run}_classifier", "model.num_classes=2"} <= set(commands[2])
    reference = [
        "--reference",
        str(folder),
        "--image-size",
        "32",
        "--num-images",
        "6",
        "--labels",
        "reference",
    ]
    assert commands[3] == [
        *("flashdit", "eval", "--checkpoint", run),
        *reference,
        *("--extractor", f"{run}_classifier"),
    ]


def test_an_out_that_begins_with_a_dash_is_no_option_of_the_printed_command(tmp_path):
    assert new.train_command(Path("-x.yaml")) == "flashdit train --config ./-x.yaml"


@pytest.mark.parametrize(
    "name", ["a #b", "017", " x ", "[x]", "it's: *", "$HOME-like", "ü\t\x7f", 'a"b', "-x"]
)
def test_a_hard_name_comes_out_of_the_yaml_and_of_the_command_that_bash_reads(tmp_path, capsys, name):
    folder = folder_of(tmp_path / name, *[(40, 40)] * 4)
    _, printed = written(capsys, "--images", folder, "--latents", "digits", f"--name={name.replace('$', '')}")
    assert config.load("mine.yaml").data["path"] == str(folder)
    assert config.load("mine.yaml").run.dir == f"runs/{name.replace('$', '')}"
    (command,) = [line for line in printed.splitlines() if line.startswith("  iwin classify")]
    shell = "iwin() { shift; printf '%s\\0' \"$@\"; }\n" + command
    words = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    made = load_classifier_config(None, [word for word in words.split("\0") if "=" in word])
    assert made.data["path"] == str(folder)
    assert made.run.dir == f"runs/{name.replace('$', '')}_classifier"


def test_inception_is_the_extractor_where_its_weights_are(tmp_path, capsys, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"")
    monkeypatch.setenv(inception.WEIGHTS_VARIABLE, str(tmp_path / "weights.pth"))
    _, printed = written(capsys, "--images", folder_of(tmp_path / "p", *[(40, 40)] * 4))
    assert "iwin classify" not in printed
    assert "--extractor" not in printed


def test_one_class_is_trained_without_guidance_and_says_what_scoring_needs(tmp_path, capsys):
    folder = folder_of(tmp_path / "p", *[(40, 40)] * 4, classes=("only",))
    made, printed = written(capsys, "--images", folder)
    assert made["sampling"]["cfg_scale"] == 1
    assert "--extractor-weights INCEPTION.pth  # fetch weights-inception" in printed


@pytest.mark.parametrize(
    ("sides", "expected"),
    [((64, 64, 33), 64), ((64, 33, 33), 32), ((300, 256), 256), ((130, 128, 31, 90), 128), ((20, 24), 32)],
)
def test_half_of_the_images_have_the_chosen_size(tmp_path, capsys, sides, expected):
    folder = folder_of(tmp_path / "p", *((side, side + 3) for side in sides))
    made, _ = written(capsys, "--images", folder)
    assert made["data"]["image_size"] == expected


def test_small_images_and_oblong_ones_are_told(tmp_path, capsys):
    _, printed = written(capsys, "--images", folder_of(tmp_path / "p", (10, 40), (20, 50), (20, 20)))
    assert "all of them, 3 smaller than 32 px were enlarged, a/0.png 3.2 times" in printed
    assert "45% of an image is cropped away on average" in printed, "(3/4 + 3/5 + 0) / 3"


def test_what_is_as_expected_is_not_told(tmp_path, capsys):
    _, printed = written(capsys, "--images", folder_of(tmp_path / "p", (90, 64), (64, 90), (64, 64)))
    assert "cropped" not in printed
    assert "enlarged" not in printed


def test_an_unreadable_image_is_told_and_not_counted(tmp_path, capsys):
    folder = folder_of(tmp_path / "p", *[(40, 40)] * 3)
    (folder / "a" / "text.png").write_text("no picture")
    made, printed = written(capsys, "--images", folder)
    assert "p: 3 images in 2 classes; left out: 1 unreadable" in printed
    assert "refused by scoring: a/text.png: cannot identify" in printed
    assert made["training"]["steps"] == SCALES[0].least
    assert (tmp_path / "mine.yaml").read_text().startswith("# 3 images at 32×32")


def test_of_many_images_some_are_looked_at_all_over_the_folder(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "p", *[(40, 40)] * 6)
    monkeypatch.setattr(survey, "SEEN_AT_MOST", 3)
    found = survey.survey_folder(folder)
    assert [*found.sides] == ["a/0.png", "a/4.png", "b/3.png"], "every other one of a/0 a/2 a/4 b/1 b/3 b/5"
    assert found.num_images == 6
    assert "trained on at 32×32 (by the heads of 3 files; training decodes all" in found.describe(32)[0]


def test_an_autoencoder_of_one_side_alone_gives_it_and_another_one_is_refused(tmp_path, monkeypatch):
    only = SimpleNamespace(name="Only", channels=4, factor=2, image_side=64)
    monkeypatch.setattr(LatentOptions, "autoencoder", lambda options: only)
    found = survey.survey_folder(folder_of(tmp_path / "p", *[(40, 40)] * 4))
    words = ["--images", str(tmp_path / "p"), "--out", "mine.yaml", "--latents", "only"]
    assert new.first_draft(found, new.parse(words)).image_size == 64
    with pytest.raises(ValueError, match="--image-size: Only takes images of 64×64 alone, got 32×32"):
        new.first_draft(found, new.parse([*words, "--image-size", "32"]))


@pytest.mark.parametrize(
    ("images", "factor", "told"), [(32_768, 8, True), (32_767, 8, False), (32_768, 1, False)]
)
def test_latents_that_take_a_gibibyte_are_told(images, factor, told):
    vae, labels = latent_space(4, factor), torch.zeros(images, dtype=torch.long)
    about = new.latents_in_memory(DataFacts((4, 32, 32), labels, None, 1, vae))
    assert about == ({"latents": about["latents"]} if told else {})
    assert not told or about["latents"].startswith("1.0 GiB in memory"), "2 · 4 bytes · 4096 · 32,768"


def test_a_small_folder_is_decoded_and_counted_as_training_counts_it(tmp_path, capsys):
    folder = folder_of(tmp_path / "p", *[(40, 40)] * 4)
    whole = (folder / "b" / "1.png").read_bytes()
    (folder / "b" / "1.png").write_bytes(whole[: len(whole) // 2])  # its head is whole
    _, printed = written(capsys, "--images", folder)
    assert "p: 3 images in 2 classes; left out: 1 unreadable" in printed
    assert "refused by scoring: b/1.png:" in printed
    assert "next:\n  take the images that cannot be read out of the folder" in printed
    assert "--num-images 3" in printed
    assert "epochs of 3\n" in printed


def test_of_a_large_folder_only_heads_are_read_and_that_is_said(tmp_path, capsys, monkeypatch):
    folder = folder_of(tmp_path / "p", *[(40, 40)] * 4)
    monkeypatch.setattr(survey, "DECODED_AT_MOST", 4 * 40 * 40 - 1)
    monkeypatch.setattr(survey, "read_image", None)
    _, printed = written(capsys, "--images", folder)
    assert (
        "40 px on the short side; trained on at 32×32 (by the heads of 4 files; training decodes" in printed
    )
    assert "take the images" not in printed


def test_latents_take_the_autoencoder_by_its_lasting_name(tmp_path, capsys):
    folder = folder_of(tmp_path / "p", *[(70, 70)] * 4)
    made, _ = written(capsys, "--images", folder, "--latents", "digits")
    assert made["latents"] == {"vae": "digits"}
    assert made["model"]["patch_size"] == 4, "64 pixels, factor 2: 32 latents a side, 8 tokens on a CPU"
    assert made["flow"]["prediction"] == "velocity"
    load_vae("digits").module.save_pretrained(tmp_path / "own")
    (tmp_path / "mine.yaml").unlink()
    made, _ = written(capsys, "--images", folder, "--latents", "own", "--image-size", "32")
    assert made["latents"] == {"vae": str(tmp_path / "own")}
    assert made["model"]["patch_size"] == 2


@pytest.mark.parametrize(
    ("images", "sizes"),
    [
        (2, {"hidden_size": 192, "depth": 6, "num_heads": 3}),
        (2_000, {"hidden_size": 192, "depth": 6, "num_heads": 3}),
        (2_001, {"hidden_size": 384, "depth": 8, "num_heads": 6}),
        (20_001, SIZES["B"]),
        (200_001, SIZES["L"]),
        (1_281_167, SIZES["XL"]),
    ],
)
def test_the_model_grows_with_the_images(images, sizes):
    draft = draft_of(images)
    made = yaml.safe_load(draft.to_yaml("# header"))
    assert made["model"].items() >= sizes.items()
    assert draft.scale.least <= draft.steps <= draft.scale.most
    memory = 1 / (1 - made["ema"]["decay"]) / draft.steps
    assert 0.03 <= memory <= 0.05
    assert made["optimizer"]["decay_steps"] == made["training"]["steps"] == draft.steps
    assert made["optimizer"]["warmup_steps"] < draft.steps / 10


@pytest.mark.parametrize(
    ("options", "patch_size"),
    [
        ({}, 4),
        ({"device": "cpu"}, 8),  # 8×8 tokens: a quarter of the work
        ({"device": "cpu", "image_size": 256}, 16),  # patches of 32 would be coarse
        ({"device": "cpu", "num_images": 5_000}, 8),
        ({"device": "cpu", "num_images": 50_000}, 4),
        ({"image_size": 96}, 6),
        ({"image_size": 60}, 4),  # 15×15: windows are padded
        ({"image_size": 36, "latents": "f2", "space": latent_space(4, factor=2)}, 2),  # 9×9 of 18×18
    ],
)
def test_patches_make_a_grid_of_at_most_sixteen(options, patch_size):
    assert draft_of(**{"num_images": 100} | options).patch_size == patch_size


@pytest.mark.parametrize(
    ("channels", "loss"), [(4, {"cosine_weight": 0}), (15, {"cosine_weight": 0}), (16, None)]
)
def test_the_angle_between_velocities_counts_where_there_are_many_channels(channels, loss):
    draft = draft_of(100, latents="f2", space=latent_space(channels, factor=2))
    assert yaml.safe_load(draft.to_yaml("# header"))["flow"].get("loss") == loss


def test_previews_come_within_minutes_and_take_little_of_the_time():
    draft = draft_of(1_000, device="cpu")
    quick, slow = (draft.paced(seconds, 1) for seconds in (0.01, 2.0))
    assert quick.preview_every == 250, "a twentieth of 7,800 steps"
    evaluations = 40 * 40 * 2
    assert slow.preview_every * 32 * 3 == pytest.approx(evaluations / 0.1, rel=0.4)
    assert slow.save_every * 2.0 <= 5 * 60
    assert slow.log_every * 2.0 <= 60


@pytest.mark.parametrize(("threshold", "told"), [(1, True), (1e9, False)])
def test_images_that_a_model_sees_too_often_are_told_of(tmp_path, capsys, monkeypatch, threshold, told):
    monkeypatch.setattr(new, "MEMORISED", threshold)
    made, printed = written(capsys, "--images", folder_of(tmp_path / "p", *[(40, 40)] * 4))
    times = made["training"]["steps"] * made["training"]["global_batch_size"] / 4
    assert (f"few images   each is seen {times:,.0f} times" in printed) == told


def test_what_does_not_fit_the_memory_is_accumulated(tmp_path, capsys, monkeypatch):
    folder = folder_of(tmp_path / "p", *[(40, 40)] * 4)
    monkeypatch.setattr(process, "device_memory", lambda device: 200 * 2**20)
    made, printed = written(capsys, "--images", folder)
    assert made["training"]["accumulation"] > 1
    assert "MiB here" not in printed
    (tmp_path / "mine.yaml").unlink()
    monkeypatch.setattr(process, "device_memory", lambda device: 2**20)
    made, printed = written(capsys, "--images", folder)
    assert made["training"]["accumulation"] == made["training"]["global_batch_size"]
    assert "of 1.00 MiB here" in printed


def test_a_cpu_gets_a_smaller_model_where_the_one_that_suits_takes_more_than_a_day():
    fast, slow = (Machine(devices=1, peak_tflops=peak, mfu=0.5, measured="cpu") for peak in (100.0, 0.03))
    suits = draft_of(5_000, device="cpu")
    kept, _, about = new.affordable(suits, fast)
    assert (kept, [*about]) == (suits, ["time"])
    smaller, seconds, about = new.affordable(suits, slow)
    assert smaller.scale is SCALES[0]
    assert seconds * smaller.steps < 86_400
    assert about["model"].endswith("hidden_size 384, depth 8 would take 3.2 days")
    flops = 3 * forward_flops(kept.scale.model | kept.sizes | {"patch_size": 8}) * 64 * kept.steps
    assert flops / (0.5 * 0.03e12) / 86_400 == pytest.approx(3.2, abs=0.05)
    gpu, _, about = new.affordable(draft_of(5_000), slow)
    assert gpu.scale is SCALES[1]
    assert "for less" in about


def test_counts_are_round():
    given = (0.2, 10, 19, 24, 49, 99, 240, 260, 999, 7_000)
    assert [round_count(value) for value in given] == [10, 10, 10, 20, 25, 50, 200, 250, 500, 5_000]


def test_what_cannot_be_is_one_sentence_and_writes_nothing(tmp_path, exit_message):
    folder = folder_of(tmp_path / "p", *[(40, 40)] * 4)

    def refused(*words):
        return exit_message(new, *words)

    def about(*words):
        sentence = refused("--images", folder, "--out", "mine.yaml", *words)
        assert not (tmp_path / "mine.yaml").exists()
        return sentence

    (tmp_path / "empty").mkdir()
    one = folder_of(tmp_path / "one", (40, 40))
    assert "--images must be a folder of images, got absent" in about("--images", "absent")
    assert "--images must hold images" in about("--images", "empty")
    assert "at least 2 images that can be read, got 1" in about("--images", one)
    assert "--latents: latents.vae and --vae must be a data set that brings" in about("--latents", "sd-vae")
    assert "--image-size must be a multiple of 4 or" in about("--image-size", "61")
    assert "--image-size must be from 1 to 8192, got 0" in about("--image-size", "0")
    assert "--image-size must be from 1 to 8192, got 100000" in about("--image-size", "100000")
    assert "--image-size: the image size must be a multiple of the VAE's factor=2" in about(
        *("--latents", "digits", "--image-size", "33")
    )
    assert "--name must be the name of a folder in runs, got 'a/b'" in about("--name", "a/b")
    assert "a new name with $ stands for a variable" in about("--name", "$x")
    (tmp_path / "runs" / "old").mkdir(parents=True)
    assert "runs/old exists: give another --name" in about("--name", "old")
    assert "--out must be a .yaml file, got mine.txt" in refused("--images", folder, "--out", "mine.txt")
    (tmp_path / "there.yaml").write_text("seed: 3\n")
    assert "there.yaml exists" in refused("--images", folder, "--out", "there.yaml")
    assert (tmp_path / "there.yaml").read_text() == "seed: 3\n"
