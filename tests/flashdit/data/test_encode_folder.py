"""Encoding a folder of images into shards, and the script as a user runs it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hard_pictures import make_hard_pictures
from PIL import Image
from safetensors.torch import load_file

from flashdit.commands import encode as encode_latents
from flashdit.commands import train
from flashdit.data.autoencoders import load_vae
from flashdit.data.encode import open_latents
from flashdit.data.encode_folder import EncodingOptions, FolderEncoding
from flashdit.data.images import centre_crop
from flashdit.data.latents import LatentOptions
from flashdit.data.manifest import MANIFEST, verify
from flashdit.data.shards import LatentShards
from flashdit.data.sources import ImageFolder, ImagesOptions
from flashdit.digits.images import digits
from flashdit.shared import process
from flashdit.shared.files import OWN_CHECKSUM, file_sha256, read_checked_json

ROOT = Path(__file__).parents[3]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
CLASSES = {"cat": 9, "eel": 14}


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
            expected = vae.encode(seen)[0]
            torch.testing.assert_close(source.latent(row, mirrored), expected, rtol=1e-5, atol=1e-5)


def test_the_manifest_tells_vae_counts_and_checksums(options, tmp_path, caplog):
    manifest = encode(options)
    assert manifest["vae_identity"] == load_vae("digits").identity
    assert (manifest["listed"], manifest["encoded"]) == (23, 21)
    assert list(manifest["unreadable"]) == ["cat/07.png", "eel/03.png"]
    assert "skipped cat/07.png, which cannot be read: cannot identify image file" in caplog.text
    assert [shard["rows"] for shard in manifest["shards"]] == [5, 4, 4, 5, 3]
    for shard in manifest["shards"]:
        path = tmp_path / "out" / shard["file"]
        assert (path.stat().st_size, file_sha256(path)) == (shard["bytes"], shard["sha256"])
    assert read_checked_json(tmp_path / "out" / MANIFEST) == json.loads(json.dumps(manifest))


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
        ({"background": "#000"}, r"whose background is white, not #000"),
        ({"images": "other"}, r"out holds latents of other images, none of which is in .*other"),
    ],
)
def test_another_encoding_into_the_same_folder_is_refused(options, images, tmp_path, change, message):
    encode(options)
    if "vae" in change:
        vae = load_vae("digits")
        torch.nn.init.ones_(vae.module.encoder.conv_in.bias)
        vae.module.save_pretrained(tmp_path / "other")
    if "images" in change:
        for name in CLASSES:
            (tmp_path / "other" / name).mkdir(parents=True)
            Image.new("RGB", (40, 40), "red" if name == "cat" else "blue").save(
                tmp_path / "other" / name / "a.png"
            )
    change = {name: str(tmp_path / "other") if value == "other" else value for name, value in change.items()}
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        FolderEncoding(replace(options, **change))
    assert contents(tmp_path / "out") == before


def labels_by_name(options):
    """Returns the label of each encoded image by its name, from records and shards as they lie there."""
    found = {}
    for path in sorted(Path(options.out, "records").glob("shard*.json")):
        record = json.loads(path.read_text())
        names = [name for name in record["images"] if name not in record["unreadable"]]
        labels = load_file(Path(options.out) / record["file"])["labels"].tolist()
        found |= dict(zip(names, labels, strict=True))
    return found


def state(folder):
    """Returns when each shard was written, by name."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(Path(folder).glob("*.safetensors"))}


@pytest.fixture
def copied(images, options, tmp_path):
    """Returns options of an encoding of a folder of its own, done once."""
    shutil.copytree(images, tmp_path / "copy")
    options = replace(options, images=str(tmp_path / "copy"))
    encode(options)
    return options


def test_deleting_a_skipped_file_writes_no_shard_again(copied):
    before = state(copied.out)
    Path(copied.images, "cat", "07.png").unlink()
    manifest = encode(copied)
    assert state(copied.out) == before
    assert (manifest["listed"], manifest["encoded"]) == (22, 21)
    assert list(manifest["unreadable"]) == ["eel/03.png"]


def test_lost_and_new_images_change_only_their_shards(copied, tmp_path, caplog):
    caplog.set_level("INFO")
    before = state(copied.out)
    Path(copied.images, "cat", "01.png").unlink()
    for name in ("cat/aa.png", "eel/zz.png"):
        Image.new("RGB", (40, 40), "red").save(Path(copied.images, name))
    caplog.clear()
    manifest = encode(copied, ranks=2)
    after = state(copied.out)
    assert "images since the last encoding: 1 gone, 2 new; 4 of 5 shards stay as they are" in caplog.text
    assert [name for name in before if after[name] != before[name]] == ["latents_rank00_shard000.safetensors"]
    assert len(after) == 6  # the first has room for one of the two
    assert manifest["encoded"] == 22
    labels = labels_by_name(copied)
    files = {path.relative_to(copied.images).as_posix() for path in Path(copied.images).rglob("*.*")}
    assert labels.keys() == files - {"cat/07.png", "eel/03.png"}
    assert all(label == ["cat", "eel"].index(name[:3]) for name, label in labels.items())
    vae, source = load_vae("digits"), LatentShards(Path(copied.out))
    expected = vae.encode(
        torch.tensor([255, 0, 0], dtype=torch.uint8).expand(1, 32, 32, 3).permute(0, 3, 1, 2)
    )
    assert sum(torch.allclose(source.latent(row), expected[0], atol=1e-4) for row in range(22)) == 2
    assert manifest["mean"] == pytest.approx(source.sample().double().mean((0, 2, 3)).tolist(), rel=1e-6)
    assert encode(copied) == manifest
    assert state(copied.out) == after


def test_an_update_that_is_cut_off_is_finished_by_the_next(copied):
    for name in ("cat/01.png", "eel/09.png"):
        Path(copied.images, name).unlink()
    Image.new("RGB", (40, 40), "red").save(Path(copied.images, "cat", "aa.png"))
    cut = FolderEncoding(copied)
    cut.begin()
    with pytest.raises(ValueError, match=r"an encoding must be complete"):
        LatentShards(Path(copied.out))
    cut.write(0, 3, progress=False)  # a third of the shards
    manifest = encode(copied)
    assert manifest["encoded"] == 20
    assert len(labels_by_name(copied)) == 20


@pytest.mark.parametrize("gone", ["plan.json", "shard001.json", "plan.json, damaged"])
def test_a_lost_record_is_named(copied, caplog, gone):
    out = Path(copied.out)
    before, record = contents(out), out / "records" / gone.partition(",")[0]
    record.unlink()
    if "damaged" in gone:
        record.write_text("{")
    if "plan" in gone:
        words = r"plan.json is not" if "damaged" in gone else r"out holds latents, but no records/plan.json"
        with pytest.raises(ValueError, match=words):
            FolderEncoding(copied)
        return
    encode(copied)
    assert contents(out) == before
    assert "records has no record of latents_rank00_shard001.safetensors: encoded again" in caplog.text
    assert "new" not in caplog.text


DAMAGE = {
    "flipped": lambda text: text.replace('"rows": 4', '"rows": 5').replace('"encoded": 2', '"encoded": 3'),
    "a list": lambda text: "[]",
    "another key": lambda text: json.dumps(
        {key.replace("sha", "sho").replace("std", "sdt"): value for key, value in json.loads(text).items()}
    ),
    "empty": lambda text: "{}",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", ["records/shard001.json", MANIFEST])
def test_a_damaged_record_or_manifest_is_named_and_made_again(copied, caplog, file, damage):
    out = Path(copied.out)
    before, path = contents(out), out / file
    path.write_text(DAMAGE[damage](path.read_text()))
    if file == MANIFEST:
        with pytest.raises(ValueError, match=r"must .*manifest\.json"):
            LatentShards(out)
    encode(copied)
    assert contents(out) == before
    told = "its images are encoded again" if "records" in file else "manifest.json .*: it is written anew"
    assert re.search(told, caplog.text)


def test_a_damaged_record_of_images_that_are_gone_is_removed(copied):
    record = Path(copied.out, "records", "shard004.json")
    names = read_checked_json(record)["images"]
    record.write_text("[]")
    for name in names:
        Path(copied.images, name).unlink()
    assert [shard["rows"] for shard in encode(copied)["shards"]] == [5, 4, 4, 5]
    assert len(LatentShards(Path(copied.out))) == 18
    assert not record.exists()


def test_a_copied_record_is_no_second_shard(copied, caplog):
    records = Path(copied.out, "records")
    before = encode(copied)
    for name in ("shard007.json", "shard001 (copy).json"):
        shutil.copy(records / "shard001.json", records / name)
    assert encode(copied) == before
    assert "a record must be of the shard of its name" in caplog.text
    assert not (records / "shard007.json").exists()


def test_a_plan_that_is_none_is_refused(copied):
    for text in ("[]", "{"):
        Path(copied.out, "records", "plan.json").write_text(text)
        with pytest.raises(ValueError, match=r"must be as written, .*plan\.json is not"):
            FolderEncoding(copied)


def test_a_repaired_image_is_encoded_and_a_new_class_comes_last(copied):
    before = state(copied.out)
    Image.new("RGB", (40, 40), "red").save(Path(copied.images, "eel", "03.png"))
    Path(copied.images, "bee").mkdir()
    Image.new("RGB", (40, 40), "blue").save(Path(copied.images, "bee", "0.png"))
    manifest = encode(copied)
    assert manifest["class_names"] == ["cat", "eel", "bee"]
    assert json.loads(Path(copied.out, "class_names.json").read_text()) == ["cat", "eel", "bee"]
    assert before.items() <= state(copied.out).items()
    labels = labels_by_name(copied)
    assert (labels["eel/03.png"], labels["bee/0.png"], len(labels)) == (1, 2, 23)
    shutil.rmtree(Path(copied.images, "bee"))
    with pytest.raises(ValueError, match=r"classes of before must still be in .*, it lacks bee"):
        encode(copied)


def as_an_earlier_version(options):
    """Makes an encoding what a version left that kept no names and took no background."""
    for path in Path(options.out, "records").glob("*.json"):
        content = json.loads(path.read_text())
        for key in ("images", "small", "background", "class_names", OWN_CHECKSUM):
            content.pop(key, None)
        path.write_text(json.dumps(content))


def test_an_encoding_of_an_earlier_version_resumes_and_can_then_be_updated(copied, caplog):
    before, manifest = state(copied.out), read_checked_json(Path(copied.out, MANIFEST))
    as_an_earlier_version(copied)
    assert json.loads(json.dumps(encode(copied))) == manifest
    assert state(copied.out) == before
    assert "a version that ignored transparency" in caplog.text
    Path(copied.images, "eel", "13.png").unlink()
    assert encode(copied)["encoded"] == 20
    as_an_earlier_version(copied)
    changed = Path(copied.images, "eel", "12.jpg")
    for change in (lambda: changed.write_bytes(changed.read_bytes() + b"more"), changed.unlink):
        change()
        with pytest.raises(
            ValueError, match=r"encoded by a version that did not keep names, and .* give another"
        ):
            FolderEncoding(copied)


def test_images_that_the_background_shows_through_are_counted(options, tmp_path, capsys):
    options = replace(options, images=str(make_hard_pictures(tmp_path / "hard")), background="#0a0b0c")
    encode_latents.main(arguments(options))
    line = (
        "2 smaller than 32 px were enlarged, formes/small.png 1.6 times; 5 with transparency are shown over "
    )
    frames = "of 1 with several frames the first is taken"
    assert f"1 unreadable; {line}#0a0b0c; {frames}: {options.out}/manifest.json" in capsys.readouterr().out
    record = Path(options.out, "records", "shard000.json")
    content = read_checked_json(record)
    del content["transparent"], content["animated"]  # as an earlier version wrote it
    record.write_text(json.dumps(content))
    manifest = encode(options)
    assert manifest["transparent"] is manifest["animated"] is None
    encode_latents.main(arguments(options))
    assert "transparency" not in capsys.readouterr().out


def test_files_with_several_frames_are_counted(options, tmp_path, capsys):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    (tmp_path / "moving").mkdir()
    for suffix in ("gif", "png", "webp", "tiff"):
        frames[0].save(tmp_path / "moving" / f"a.{suffix}", save_all=True, append_images=frames[1:])
        frames[0].save(tmp_path / "moving" / f"b.{suffix}")
    frames[0].save(tmp_path / "moving" / "c.jpg", format="MPO", save_all=True, append_images=frames[1:])
    source = ImageFolder(ImagesOptions(path=str(tmp_path / "moving"), image_size=32))
    assert {name for row, name in enumerate(source.names) if source.decode(row).animated} == {
        f"a.{suffix}" for suffix in ("gif", "png", "webp", "tiff")
    }
    reds = torch.stack([source.image(row) for row in range(len(source.names))]).float().mean((2, 3))
    assert (reds - torch.tensor([255.0, 0, 0])).abs().max() < 3
    encode_latents.main(arguments(replace(options, images=str(tmp_path / "moving"))))
    assert "; of 4 with several frames the first is taken: " in capsys.readouterr().out


def test_enlarged_images_are_told_at_once_and_at_the_end(options, caplog):
    manifest = encode(replace(options, image_size=128))
    assert manifest["enlarged"] == "21 smaller than 128 px were enlarged, cat/00.jpg 4.0 times"
    assert caplog.text.count("cat/00.jpg is enlarged 4.0 times, perhaps others too: see --image-size") == 1


def test_a_name_that_is_no_utf_8_is_skipped_and_counted(copied):
    with open(os.fsencode(copied.images) + b"/cat/caf\xe9.png", "wb") as file:
        file.write(Path(copied.images, "cat", "01.png").read_bytes())
    manifest = encode(copied)
    assert (manifest["listed"], manifest["encoded"]) == (24, 21)
    assert manifest["unreadable"]["cat/caf\\xe9.png"] == "its name is not UTF-8"


def test_transparent_pixels_have_the_background_that_is_asked_for(options, tmp_path):
    folder = tmp_path / "clear"
    folder.mkdir()
    for n, colour in enumerate(((0, 255, 0, 0), (0, 0, 0, 255))):
        Image.new("RGBA", (32, 32), colour).save(folder / f"{n}.png")
    encode(replace(options, images=str(folder), background="#ff0000"))
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).expand(1, 32, 32, 3).permute(0, 3, 1, 2)
    expected = load_vae("digits").encode(red)[0]
    torch.testing.assert_close(LatentShards(Path(options.out)).latent(0), expected, rtol=1e-4, atol=1e-4)


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
        ({"seed": -1}, r"seed must be from 0 to below 2\^63, got -1"),
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
    torch.nn.init.constant_(encoding.vae.module.encoder.conv_in.bias, float("inf"))
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
    encode_latents.main(arguments(theirs))  # its lock file is free, and gone at the end
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
    load_vae("digits").module.save_pretrained(tmp_path / "vae")
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


@pytest.mark.parametrize(("instructions", "precision"), [("amx_tile", "bf16"), ("avx2", "fp32")])
def test_auto_is_decided_by_the_device_and_written_down(options, monkeypatch, instructions, precision):
    monkeypatch.setattr(process, "this_processor", lambda: f"Acme {instructions}")
    assert FolderEncoding(replace(options, precision="auto")).plan["precision"] == precision
