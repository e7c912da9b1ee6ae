"""Encoding a folder of images into shards, and the script as a user runs it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from flashdit.commands import encode as encode_latents
from flashdit.commands import train
from flashdit.data.autoencoders import encode_images, load_vae, vae_identity
from flashdit.data.encode import open_latents
from flashdit.data.encode_folder import EncodingOptions, FolderEncoding
from flashdit.data.latents import LatentOptions
from flashdit.data.manifest import MANIFEST, verify
from flashdit.data.shards import LatentShards
from flashdit.data.images import centre_crop
from flashdit.digits.images import digits
from flashdit.shared.files import file_sha256

ROOT = Path(__file__).parents[3]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
CLASSES = {"cat": 9, "dog": 0, "eel": 14}  # a class without images is none


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Returns a folder of 23 pictures of several sizes, two of which cannot be read."""
    folder = tmp_path_factory.mktemp("images")
    pictures = iter(digits("train")[0])
    for name, count in CLASSES.items():
        (folder / name).mkdir()
        for i in range(count):
            picture = Image.fromarray(next(pictures).permute(1, 2, 0).numpy())
            picture.resize((32 + i, 34)).save(folder / name / f"{i:02d}.{'png' if i % 2 else 'jpg'}")
    (folder / "cat" / "07.png").write_bytes(b"no picture")
    broken = folder / "eel" / "03.png"
    broken.write_bytes(broken.read_bytes()[:150])
    return folder


@pytest.fixture
def options(images, tmp_path):
    out = tmp_path / "out"
    return EncodingOptions(
        images=str(images), vae="digits", out=str(out), image_size=32, batch_size=3, workers=0, shard_rows=5
    )


def encode(options, ranks=1):
    """Encodes as `ranks` processes would, one after another, and returns the manifest."""
    encodings = [FolderEncoding(options) for _ in range(ranks)]
    encodings[0].begin()
    for rank, encoding in enumerate(encodings):
        encoding.write(rank, ranks, progress=False)
    return encodings[0].finish()


def contents(folder):
    """Returns the bytes of every file of an encoding, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def arguments(options):
    given = vars(options) | {"device": "cpu"}
    words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in given.items() if name != "sample"]
    return [word for pair in words for word in pair] + ["--sample"] * options.sample


def test_latents_are_those_of_the_cropped_images_and_their_mirrors(options, images, tmp_path):
    encode(options)
    source, vae = LatentShards(tmp_path / "out"), load_vae("digits")
    readable = [
        path for path in sorted(images.rglob("*.*")) if str(path)[-10:] not in ("cat/07.png", "eel/03.png")
    ]
    assert source.class_names == ["cat", "eel"]
    assert source.labels.tolist() == [0] * 8 + [1] * 13
    for row, path in enumerate(readable):
        pixels = torch.from_numpy(np.array(centre_crop(Image.open(path).convert("RGB"), 32)))
        image = pixels.permute(2, 0, 1)[None]
        for mirrored, seen in ((False, image), (True, image.flip(-1))):
            expected = encode_images(vae, seen)[0]
            torch.testing.assert_close(source.latent(row, mirrored), expected, rtol=1e-5, atol=1e-5)


def test_the_manifest_tells_vae_counts_and_checksums(options, tmp_path, caplog):
    manifest = encode(options)
    assert manifest["vae_identity"] == vae_identity(load_vae("digits"))
    assert (manifest["listed"], manifest["encoded"]) == (23, 21)
    assert list(manifest["unreadable"]) == ["cat/07.png", "eel/03.png"]
    assert "skipped cat/07.png, which cannot be read: cannot identify image file" in caplog.text
    assert [shard["rows"] for shard in manifest["shards"]] == [5, 4, 4, 5, 3]
    for shard in manifest["shards"]:
        path = tmp_path / "out" / shard["file"]
        assert (path.stat().st_size, file_sha256(path)) == (shard["bytes"], shard["sha256"])
    assert json.loads((tmp_path / "out" / MANIFEST).read_text()) == json.loads(json.dumps(manifest))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mean_and_std_are_those_of_numpy_in_float64(options, tmp_path, dtype):
    manifest = encode(replace(options, dtype=dtype))
    files = [load_file(path)["latents"] for path in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert {file.dtype for file in files} == {getattr(torch, dtype)}
    values = torch.cat(files).double().numpy()
    assert manifest["mean"] == pytest.approx(values.mean((0, 2, 3)), rel=1e-13)
    assert manifest["std"] == pytest.approx(values.std((0, 2, 3), ddof=1), rel=1e-13)
    stored = torch.load(tmp_path / "out" / "latents_stats.pt", weights_only=True)
    assert stored["mean"].flatten().tolist() == pytest.approx(manifest["mean"], rel=1e-6)
    assert stored["std"].shape == (1, 1, 1, 1)


def test_samples_depend_on_seed_and_image_alone(options, tmp_path):
    out = {name: str(tmp_path / name) for name in ("mean", "one", "again", "other")}
    encode(replace(options, out=out["mean"]))
    encode(replace(options, out=out["one"], sample=True))
    encode(replace(options, out=out["again"], sample=True, batch_size=4, shard_rows=7), ranks=2)
    encode(replace(options, out=out["other"], sample=True, seed=1))
    mean, one, again, other = (LatentShards(Path(folder)).sample() for folder in out.values())
    torch.testing.assert_close(one, again, rtol=1e-5, atol=1e-5)
    assert (one - other).abs().mean() > 0.5 * (one - mean).abs().mean() > 0


def test_a_second_run_writes_only_what_is_missing_or_corrupt(options, tmp_path, caplog):
    encode(options)
    before, out = contents(tmp_path / "out"), tmp_path / "out"
    paths = sorted(out.glob("*.safetensors"))
    kept = {path: path.stat().st_mtime_ns for path in (paths[0], paths[2], paths[4])}
    paths[1].unlink()
    paths[3].write_bytes(paths[3].read_bytes()[:-1] + b"?")
    caplog.clear()
    encode(options, ranks=3)
    assert contents(out) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert f"{paths[1]} is missing or corrupt" in caplog.text
    assert f"{paths[3]} is missing or corrupt" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 16}, r"out holds latents whose image_size is 32, not 16: give another --out"),
        ({"sample": True}, r"whose posterior is mean, not sample"),
        ({"shard_rows": 6}, r"whose shard_rows is 5, not 6"),
        ({"dtype": "float16"}, r"whose dtype is float32, not float16"),
        ({"vae": "other"}, r"whose vae_identity is [0-9a-f]{12}, not [0-9a-f]{12}"),
        ({"images": "other"}, r"whose listing_sha256 is [0-9a-f]{12}, not [0-9a-f]{12}"),
    ],
)
def test_another_encoding_into_the_same_folder_is_refused(options, images, tmp_path, change, message):
    encode(options)
    if "vae" in change:
        vae = load_vae("digits")
        torch.nn.init.ones_(vae.encoder.conv_in.bias)
        vae.save_pretrained(tmp_path / "other")
    if "images" in change:
        shutil.copytree(images, tmp_path / "other")
        (tmp_path / "other" / "eel" / "00.jpg").unlink()
    change = {name: str(tmp_path / "other") if value == "other" else value for name, value in change.items()}
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        FolderEncoding(replace(options, **change))
    assert contents(tmp_path / "out") == before


def test_a_space_without_vae_still_knows_which_vae_made_its_latents(options):
    manifest = encode(options)
    data = {"name": "shards", "path": options.out}
    source, space = open_latents(data, LatentOptions(vae=None), torch.device("cpu"))
    assert space.identity == manifest["vae_identity"]
    assert space.mean.flatten().tolist() == pytest.approx(manifest["mean"], rel=1e-6)
    normalised = space.normalise(source.sample())
    assert abs(float(normalised.mean())) < 1e-5
    assert abs(float(normalised.std()) - 1) < 1e-3


def test_what_cannot_be_encoded_is_named(options, tmp_path):
    wrong = [
        ({"image_size": 31}, r"image size must be a multiple of the VAE's factor=2, got 31"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"seed": -1}, r"seed must not be negative, got -1"),
        ({"dtype": "float23"}, r"unknown dtype 'float23'; did you mean 'float32'"),
        ({"precision": "int8"}, r"unknown precision 'int8'"),
        ({"images": "absent"}, r"^--images must be a folder of images, got absent"),
        ({"out": str(tmp_path)}, r"--out must be a new folder or one of an earlier encoding, got"),
    ]
    (tmp_path / "something").touch()
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            FolderEncoding(replace(options, **change))
    (tmp_path / "images" / "cat").mkdir(parents=True)
    (tmp_path / "images" / "cat" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"at least one image must be readable, none of 1 is"):
        encode(replace(options, images=str(tmp_path / "images")))


def test_latents_that_are_not_finite_are_named(options):
    encoding = FolderEncoding(options)
    torch.nn.init.constant_(encoding.vae.encoder.conv_in.bias, float("inf"))
    with pytest.raises(ValueError, match=r"must be finite, those of cat/00.jpg are not with precision=tf32"):
        encoding.write(progress=False)


def test_two_processes_write_the_bytes_of_one(options, tmp_path):
    encode(options)
    theirs = replace(options, out=str(tmp_path / "two"), workers=1)
    command = [*TORCHRUN, "encode_latents.py", *arguments(theirs)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "21 of 23 images in 5 shards, 2 unreadable" in done.stdout
    assert done.stderr.count("skipped cat/07.png, which cannot be read") == 1
    assert contents(tmp_path / "two") == contents(tmp_path / "out")


def test_a_killed_encoding_resumes_to_the_bytes_of_an_uninterrupted_one(options, tmp_path):
    options = replace(options, shard_rows=1, batch_size=1, image_size=128)  # slow enough to be killed in time
    encode(options)
    theirs = replace(options, out=str(tmp_path / "killed"))
    command = [sys.executable, "encode_latents.py", *arguments(theirs)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    record = tmp_path / "killed" / "records" / "shard001.json"
    while not record.exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / MANIFEST).exists()
    with pytest.raises(ValueError, match=r"an encoding must be complete, .*killed has no manifest.json"):
        LatentShards(tmp_path / "killed")
    encode(theirs)
    assert contents(tmp_path / "killed") == contents(tmp_path / "out")


def test_the_script_encodes_then_verifies_then_train_trains(options, tmp_path, capsys, exit_message):
    encode_latents.main(arguments(options))
    assert "21 of 23 images in 5 shards, 2 unreadable" in capsys.readouterr().out
    encode_latents.main(["--verify", options.out])
    assert "5 shards, 21 latents and mirrors: as in manifest.json" in capsys.readouterr().out
    overrides = [
        f"run.dir={tmp_path / 'run'}",
        "data.name=shards",
        f"data.path={options.out}",
        "model.num_classes=2",
        "model.hidden_size=16",
        "model.depth=1",
        "training.steps=2",
        "training.global_batch_size=4",
        "sampling.steps=1",
    ]
    train.main(overrides)
    assert "trained to step 2" in capsys.readouterr().out
    load_vae("digits").save_pretrained(tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.5}))
    message = exit_message(train, *overrides, f"latents.vae={tmp_path / 'vae'}", f"run.dir={tmp_path / 'no'}")
    assert "latents.vae must be the VAE of the latents in" in message
    assert not (tmp_path / "no").exists()


def test_corruption_that_keeps_the_size_is_found_by_verify(options, tmp_path, exit_message):
    encode(options)
    path = sorted((tmp_path / "out").glob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    LatentShards(tmp_path / "out")
    message = exit_message(encode_latents, "--verify", options.out)
    assert "must have the checksums of manifest.json, latents_rank00_shard002.safetensors in" in message
    (tmp_path / "out" / MANIFEST).unlink()
    shutil.rmtree(tmp_path / "out" / "records")
    with pytest.raises(ValueError, match=r"checksums need a manifest.json, got none"):
        verify(tmp_path / "out")


def test_a_command_without_its_folders_is_one_sentence(exit_message):
    assert "encoding needs --images, --vae and --out" in exit_message(encode_latents, "--vae", "digits")


def test_help_states_the_defaults_of_the_options(capsys):
    with pytest.raises(SystemExit):
        encode_latents.parse(["--help"])
    _, _, text = capsys.readouterr().out.partition("options:")
    stated = {}
    for part in re.split(r"\n  (?=--)", text):
        if found := re.search(r"\(default: (\w+)\)", " ".join(part.split())):
            stated[part.split()[0].removeprefix("--").replace("-", "_")] = found[1]
    defaults = {field.name: str(field.default) for field in fields(EncodingOptions)}
    unstated = {"images", "vae", "out", "sample"}
    assert stated == {name: value for name, value in defaults.items() if name not in unstated}
