"""What a run goes on from: whole checkpoints, the same data wherever they lie, one writer."""

import gzip
import json
import logging
import os
import re
import shutil
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image

from flashdit import config
from flashdit.commands import autoencoder
from flashdit.shared.files import TEMPORARY, read_checked_json, write_checked_json
from flashdit.shared.locks import only_writer
from flashdit.shared.process import check_processes
from flashdit.shared.runs import list_checkpoints
from flashdit.trainer import Trainer
from flashdit.training.contents import difference_in_words, equality_in_words
from flashdit.training.guard import StopSignals
from flashdit.training.task import PeriodicAction
from iwin_tasks.commands import classify


def trainer(overrides, *more):
    return Trainer(config.load(None, [*overrides, *more]))


@pytest.mark.parametrize(
    ("file", "damage", "reason"),
    [
        ("optimizer.pt", b"", r"readable torch .*optimizer\.pt is not"),
        ("processes.pt", b"", r"readable torch .*processes\.pt is not"),
        ("state.json", b"", r"state\.json is damaged: Expecting value"),
        (
            "state.json",
            b'{"format": 1}',
            r"state\.json is damaged: it has no whole number, 0 or more, as step",
        ),
        ("ema/diffusion_pytorch_model.safetensors", b"half", r"readable safetensors file, .*ema"),
        ("config.yaml", b"", None),
        ("state.json", None, r"step_00000004 is damaged: it has no state\.json"),
        ("optimizer.pt", None, r"it has no optimizer\.pt"),
        ("processes.pt", None, r"it has no processes\.pt"),
        (
            "ema/diffusion_pytorch_model.safetensors",
            None,
            r"it has no ema/diffusion_pytorch_model\.safetensors",
        ),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_gone_on_from(
    tiny_overrides, tmp_path, caplog, file, damage, reason
):
    trainer(tiny_overrides, "training.steps=4", "training.keep_last=2").fit()
    newest = list_checkpoints(tmp_path / "run")[-1]
    if damage is None:
        (newest / file).unlink()
    else:
        (newest / file).write_bytes(damage)
    with caplog.at_level("INFO"):
        run = trainer(tiny_overrides, "training.keep_last=2")
    if reason is None:
        assert run.step == 4
        return
    assert run.step == 2
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    named = [message for message in warned if "given 2 times" not in message]
    assert len(named) == 1
    assert named[0].endswith("; the run goes on from step_00000002")
    with pytest.raises(ValueError, match=reason):
        raise ValueError(named[0])
    run.fit()
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["damaged_step_00000004", "step_00000004", "step_00000006"]


def test_without_a_whole_checkpoint_the_run_is_refused_and_nothing_is_lost(tiny_overrides, tmp_path):
    trainer(tiny_overrides, "training.steps=2").fit()
    folder = tmp_path / "run/checkpoints/step_00000002"
    (folder / "optimizer.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a whole checkpoint to go on from: .*optimizer\.pt is not"):
        trainer(tiny_overrides)
    (folder / "state.json").unlink()
    with pytest.raises(ValueError, match=r"a whole checkpoint to go on from: .*it has no state\.json"):
        trainer(tiny_overrides)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step_00000002"]


def test_a_bad_line_of_the_metrics_is_named_and_left_out(tiny_overrides, tmp_path, caplog):
    trainer(tiny_overrides, "training.steps=2").fit()
    metrics = tmp_path / "run" / "metrics.jsonl"
    first, second = metrics.read_text().splitlines(keepends=True)
    metrics.write_text(f"{first}\0\0 half\n{second}")
    trainer(tiny_overrides, "training.steps=4").fit()
    assert "metrics.jsonl: line 2 is no record and is left out" in caplog.text
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_skipped_steps_go_on_being_counted(tiny_overrides, tmp_path):
    trainer(tiny_overrides, "training.steps=2").fit()
    path = list_checkpoints(tmp_path / "run")[-1] / "state.json"
    changed = read_checked_json(path) | {"skipped": 5, "skipped_in_a_row": 2}
    write_checked_json(path, changed)
    run = trainer(tiny_overrides)
    assert (run.step, run.images_seen, run.guard.skipped, run.guard.in_a_row) == (2, 16, 5, 2)
    run.fit()
    state = json.loads((list_checkpoints(tmp_path / "run")[-1] / "state.json").read_text())
    assert (state["step"], state["images_seen"], state["skipped"], state["skipped_in_a_row"]) == (6, 48, 5, 0)


def test_what_kills_left_in_a_run_is_removed_by_the_next(tiny_overrides, tmp_path):
    trainer(tiny_overrides, "training.steps=2").fit()
    names = ("checkpoints/.step_00000003.a", ".config.yaml.b", "samples/.step_00000001.png.c")
    leftovers = [tmp_path / "run" / f"{name}{TEMPORARY}" for name in names]
    for leftover in leftovers:
        leftover.mkdir(parents=True)
    trainer(tiny_overrides).fit()
    assert not [path for path in leftovers if path.exists()]


def move_data(shards, tmp_path):
    shards.rename(tmp_path / "moved")
    return tmp_path / "moved"


def test_moved_data_and_defaults_that_are_written_out_are_the_same(
    tiny_overrides, tiny_shards, tmp_path, caplog
):
    trainer(tiny_overrides, "training.steps=2").fit()
    moved = move_data(tiny_shards, tmp_path)
    os.utime(next(moved.glob("*.safetensors")))
    written = ("data.mirrors=true", "model.qk_norm=false", "model.attention.kernel=3")
    with caplog.at_level("INFO"):
        run = trainer(tiny_overrides, f"data.path={moved}/", *written)
    assert run.step == 2
    assert f"data.path is {moved}/, was {tiny_shards}: its files have the same names and sizes" in caplog.text
    assert "resumed with another data" not in caplog.text


def test_a_relative_path_or_a_slash_is_the_same_for_a_run_that_kept_no_contents(
    tiny_overrides, tiny_shards, tmp_path, monkeypatch
):
    trainer(tiny_overrides, "training.steps=2").fit()
    (tmp_path / "run" / "contents.json.gz").unlink()
    monkeypatch.chdir(tmp_path)
    assert trainer(tiny_overrides, "data.path=shards/").step == 2


def test_changed_shards_are_refused_with_what_changed(tiny_overrides, tiny_shards, tmp_path):
    trainer(tiny_overrides, "training.steps=2").fit()
    one, other = sorted(tiny_shards.glob("*.safetensors"))
    shutil.copy(one, tiny_shards / "latents_rank00_shard002.safetensors")
    other.write_bytes(one.read_bytes())
    said = (
        r"another data\.path: files 1 more, 1 changed, such as latents_rank00_shard002\.safetensors, latents"
    )
    with pytest.raises(ValueError, match=said):
        trainer(tiny_overrides)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000002"]


@pytest.fixture
def image_run(tmp_path):
    """Returns the overrides of a run on two classes of three pictures each."""
    for name, number in ((name, number) for name in ("cat", "hen") for number in range(3)):
        path = tmp_path / "images" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draws = torch.Generator().manual_seed(number)
        Image.fromarray(torch.randint(256, (16, 16, 3), generator=draws).byte().numpy()).save(path)
    return [
        *(f"run.dir={tmp_path / 'run'}", "data.name=images", "data.image_size=16", "latents.vae=digits"),
        *("model.num_classes=2", "model.sample_size=8", "model.hidden_size=16", "model.depth=1"),
        *("training.steps=2", "training.global_batch_size=4", "training.preview_every=0"),
    ]


def test_images_are_the_same_by_name_and_size_and_what_changed_is_said(image_run, tmp_path):
    trainer(image_run, f"data.path={tmp_path / 'images'}").fit()
    shutil.copytree(tmp_path / "images", tmp_path / "staged")  # other times
    assert trainer(image_run, f"data.path={tmp_path / 'staged'}", "training.steps=3").step == 2
    kept = json.loads(gzip.decompress((tmp_path / "run" / "contents.json.gz").read_bytes()))
    assert len(kept["data.path"]["files"]) == 6
    seen = json.loads((tmp_path / "run" / "images.json").read_text())
    assert seen["images"].keys() == kept["data.path"]["files"].keys()
    assert all(size > 0 for size in kept["data.path"]["files"].values())
    (tmp_path / "staged/cat/0.png").rename(tmp_path / "staged/cat/9.png")
    with pytest.raises(ValueError, match=r"files 1 more, 1 fewer, such as cat/9\.png, cat/0\.png; give"):
        trainer(image_run, f"data.path={tmp_path / 'staged'}", "training.steps=3")


def test_a_moved_folder_of_a_run_that_kept_no_contents_is_known_by_its_classes(image_run, tmp_path, caplog):
    trainer(image_run, f"data.path={tmp_path / 'images'}").fit()
    kept = tmp_path / "run" / "contents.json.gz"
    kept.unlink()
    moved = (tmp_path / "images").rename(tmp_path / "moved")
    assert trainer(image_run, f"data.path={moved}", "training.steps=3").step == 2
    for damaged, reason in (
        (b"no gzip", "Not a gzipped file"),
        (gzip.compress(b"[]"), "must hold a mapping"),
        (gzip.compress(b"{}")[:10] + b"\xff" + gzip.compress(b"{}")[11:], "invalid block type"),
    ):
        kept.write_bytes(damaged)
        assert trainer(image_run, f"data.path={moved}", "training.steps=3").step == 2
        assert f"{kept} is damaged, so the data are compared by what the checkpoint tells: " in caplog.text
        assert reason in caplog.text


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        ("abc", "abc", ""),
        ("abc", "abd", "its configuration or weights are others"),
        ({"classes": ["a", "x"]}, {"classes": ["a"]}, "class 'x' is gone"),
        ({"classes": ["a"]}, {"classes": ["a", *"bcde"]}, "classes 'b', 'c', 'd', … are new"),
        ({"classes": ["a", "b"]}, {"classes": ["b", "a"]}, "its classes have another order"),
        ({"classes": None}, {"classes": None, "files": {"x": 1}}, ""),
        ({"files": {"x": 1, "y": 2}}, {"files": {"x": 1}}, "files 1 fewer, such as y"),
        ({"files": {}}, {"files": {"a\x1b[A\n": 1}}, r"files 1 more, such as a\x1b[A\n"),
        ({"classes": ["a"]}, {"classes": ["a", "b\r"]}, r"class 'b\r' is new"),
    ],
)
def test_differences_are_told_in_words(before, now, words):
    assert difference_in_words(before, now) == words


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({"classes": ["a"], "files": {"a/0.png": 7}}, "its files have the same names and sizes"),
        (
            {"files": {"x.safetensors": "5ca1"}},
            "its manifest has the same checksums (encode --verify compares the files by them)",
        ),
        ({"classes": ["a"]}, "its classes have the same names, of its files nothing is known"),
        ({"classes": None}, "what it was is not known"),
        ("5ca1", "its configuration and weights are the same"),
    ],
)
def test_no_more_is_said_to_be_the_same_than_was_compared(contents, words):
    assert difference_in_words(contents, contents) == ""
    assert equality_in_words(contents, contents) == words


def test_a_vae_may_be_added_to_a_run_without_one_and_not_taken_away(tiny_overrides, tmp_path):
    small = ("model.sample_size=8",)
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    vae = AutoencoderKL(block_out_channels=[8], latent_channels=3, norm_num_groups=4, **blocks)
    vae.save_pretrained(tmp_path / "vae")
    trainer(tiny_overrides, *small, "training.steps=2").fit()
    added = trainer(tiny_overrides, *small, f"latents.vae={tmp_path / 'vae'}", "training.preview_every=0")
    assert added.step == 2
    added.fit()
    with pytest.raises(ValueError, match=r"holds a run with latents\.vae=.*, got null"):
        trainer(tiny_overrides, *small, "training.steps=8")


def test_a_run_that_another_process_trains_is_refused(tiny_overrides, tmp_path):
    run = trainer(tiny_overrides, "training.steps=2")
    with only_writer(tmp_path / "run"):
        with pytest.raises(ValueError, match=r"run must have one writer at a time"):
            trainer(tiny_overrides)
        with pytest.raises(ValueError, match=r"run must have one writer at a time"):
            run.fit()
    late = trainer(tiny_overrides)
    run.fit()
    with pytest.raises(ValueError, match=r"was trained by another process meanwhile: start again"):
        late.fit()


def test_the_precision_that_changed_is_said(tiny_overrides, caplog):
    trainer(tiny_overrides, "training.steps=2").fit()
    AcceleratorState._reset_state(reset_partial_state=True)
    with caplog.at_level("INFO"):
        trainer(tiny_overrides, "training.precision=bf16")
    assert "resumed with another training.precision: bf16, was fp32" in caplog.text


def test_variables_of_a_launcher_change_no_update_and_are_told(tiny_overrides, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with caplog.at_level("INFO"):
        trainer(tiny_overrides, "training.steps=2").fit()
    norms = [
        json.loads(line)["grad_norm"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert min(norms) > 0, "an update was left out"
    said = "training.precision=fp32 decides, the launcher's mixed_precision=bf16 is not used"
    assert caplog.text.count(said) == 1


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(2)
    with pytest.raises(ValueError, match=r"launcher's 2 processes \(WORLD_SIZE\) must work together"):
        check_processes(1)


def test_a_start_says_what_is_trained(tiny_overrides, tmp_path, caplog):
    with caplog.at_level("INFO"):
        trainer(tiny_overrides, "training.steps=2").fit()
        run = trainer(tiny_overrides)
        run.fit()
    count = sum(parameter.numel() for parameter in run.model.parameters())
    rest = f"{count:,} parameters in fp32 on cpu; 37 images in 3 classes"
    assert f"{tmp_path / 'run'}: new run, to step 2; {rest}" in caplog.text
    assert f"{tmp_path / 'run'}: goes on after step 2, to step 6; {rest}" in caplog.text
    assert run.outcome == f"trained to step 6: {tmp_path / 'run'}"


def test_a_signal_within_an_evaluation_ends_it_and_saves(tiny_overrides, tmp_path):
    run = trainer(tiny_overrides, "training.save_every=100")

    def long_evaluation(step, average):
        os.kill(os.getpid(), signal.SIGUSR1)
        raise AssertionError("the evaluation went on")

    run.task.actions = [PeriodicAction(every=3, run=long_evaluation)]
    run.fit()
    assert run.outcome == "stopped at step 3 of 6 by SIGUSR1: run the same command again to go on"
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_00000003"]


def test_signals_that_a_platform_lacks_are_left_out(monkeypatch):
    monkeypatch.delattr(signal, "SIGUSR1")
    with StopSignals() as stop:
        assert set(stop.previous) == {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def test_a_run_that_ends_with_broken_weights_is_an_error_and_not_a_trained_model(tiny_overrides):
    run = trainer(tiny_overrides, "optimizer.lr=1e30", "training.steps=4")
    with pytest.raises(FloatingPointError, match="must be finite at the end, got 3 skipped steps"):
        run.fit()


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_a_damaged_space_or_state_is_named_and_the_run_goes_on_from_the_checkpoint_before(
    tiny_overrides, tmp_path, caplog, damage
):
    trainer(tiny_overrides, "training.steps=4").fit()
    newest = tmp_path / "run" / "checkpoints" / "step_00000004"
    for name in ("latents.safetensors", "state.json"):
        whole = (newest / name).read_bytes()
        broken = {"empty": b"", "cut": whole[: len(whole) // 2], "flipped": whole[:-9] + b"x" + whole[-8:]}
        assert len(broken["flipped"]) == len(whole)
        (newest / name).write_bytes(broken[damage])
        AcceleratorState._reset_state(reset_partial_state=True)
        assert trainer(tiny_overrides, "training.steps=6").step == 2
        assert "is damaged" in caplog.text
        (newest / name).write_bytes(whole)


def test_a_run_whose_autoencoder_is_named_by_a_damaged_space_goes_on_from_the_one_before(
    image_run, tmp_path, caplog
):
    options = [*image_run, f"data.path={tmp_path / 'images'}"]
    trainer(options, "training.steps=2", "training.save_every=1").fit()
    space = tmp_path / "run" / "checkpoints" / "step_00000002" / "latents.safetensors"
    content = space.read_bytes()
    start = content.index(b'identity\\": \\"') + 14
    space.write_bytes(content[:start] + b"0000" + content[start + 4 :])
    assert trainer(options).step == 1
    assert "latents.safetensors is damaged: its checksum" in caplog.text


def test_a_run_that_lost_its_configuration_does_not_go_on(tiny_overrides, tmp_path):
    trainer(tiny_overrides, "training.steps=2").fit()
    newest = list_checkpoints(tmp_path / "run")[-1]
    configs = [tmp_path / "run" / "config.yaml", newest / "config.yaml"]
    configs[0].unlink()
    assert trainer(tiny_overrides).step == 2  # the checkpoint has its own
    whole = configs[1].read_text()
    configs[1].write_text(whole.replace("data:\n  name: shards", "data: digits\nrest:\n  name: shards"))
    with pytest.raises(ValueError, match=r"must be as training wrote it, that of .* has data: dig"):
        trainer(tiny_overrides)
    for damage in ("[" * 5000, "- a list", ""):
        configs[1].write_text(damage)
        with pytest.raises(
            ValueError,
            match=r"^a run must have its configuration to go on, neither .* or start another",
        ):
            trainer(tiny_overrides, "seed=3")
    configs[1].unlink()
    with pytest.raises(ValueError, match=r"^a run must have its configuration to go on"):
        trainer(tiny_overrides, "seed=3")


def test_damaged_checkpoints_are_moved_aside_and_none_takes_another_ones_place(tiny_overrides, tmp_path):
    trainer(tiny_overrides, "training.steps=4").fit()
    folder = tmp_path / "run" / "checkpoints"
    for _ in range(2):
        (folder / "step_00000004" / "optimizer.pt").write_bytes(b"")
        trainer(tiny_overrides, "training.steps=4").fit()
    assert {path.name for path in folder.glob("damaged_*")} == {
        "damaged_step_00000004",
        "damaged_step_00000004_1",
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("checkpoints", "training must find a folder or nothing at "),
        ("samples", "training must find a folder or nothing at "),
        ("metrics.jsonl/", "training must find a file or nothing at "),
    ],
)
def test_a_file_for_a_folder_or_a_folder_for_a_file_is_refused_before_anything_is_written(
    tiny_overrides, tmp_path, name, message
):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.mkdir() if name.endswith("/") else path.touch()
    with pytest.raises(ValueError, match=message):
        trainer(tiny_overrides)
    assert list((tmp_path / "run").iterdir()) == [path]


def test_a_snapshot_of_ones_own_is_left_alone(tiny_overrides, tmp_path):
    mine = tmp_path / "run" / "ema_snapshots" / "step_best.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    trainer(tiny_overrides, "training.steps=2").fit()
    assert mine.read_bytes() == b"mine"


def test_a_prediction_that_is_written_out_is_no_change(tiny_overrides):
    trainer(tiny_overrides, "training.steps=2").fit()
    assert trainer(tiny_overrides, "flow.prediction=velocity").step == 2


@pytest.mark.parametrize(
    ("name", "text"),
    [("config.yaml", "# mine\ntraining: {steps: 2}\n"), ("metrics.jsonl", '{"accuracy": 3}\n')],
)
def test_what_is_ones_own_in_the_run_folder_is_not_replaced(tiny_overrides, tmp_path, name, text):
    mine = tmp_path / "run" / name
    mine.parent.mkdir()
    mine.write_text(text)
    with pytest.raises(
        ValueError, match=rf"^the {re.escape(name)} in run\.dir must be a new file or an earlier one"
    ):
        trainer(tiny_overrides)
    assert mine.read_text() == text


def test_pictures_of_ones_own_are_not_replaced_by_previews_of_a_new_run(tiny_overrides, tmp_path):
    mine = tmp_path / "run" / "samples" / "step_00000002.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"^a new run must find no pictures at .*samples, which it would"):
        trainer(tiny_overrides)
    mine.unlink()
    trainer(tiny_overrides, "training.steps=2").fit()
    mine.write_bytes(b"a preview")
    (tmp_path / "run" / "config.yaml").unlink()
    assert trainer(tiny_overrides).step == 2


def test_the_start_says_how_far_shards_were_compared(tiny_overrides, tiny_shards, caplog):
    manifest, run = tiny_shards / "manifest.json", "run.dir=elsewhere"
    with caplog.at_level("INFO"):
        trainer(tiny_overrides, run)
        assert not manifest.exists()
        found = {path.name: path for path in tiny_shards.glob("*.safetensors")}
        shards = [{"file": name, "bytes": path.stat().st_size, "sha256": "0"} for name, path in found.items()]
        content = {"format": 1, "vae_identity": "v", "mean": [0] * 3, "std": [1] * 3, "shards": shards}
        manifest.write_text(json.dumps(content))
        trainer(tiny_overrides, run)
    start = f"the shards of {tiny_shards} were compared"
    assert f"{start} by their tensors' shapes, as there is no manifest.json\n" in caplog.text
    assert f"{start} by name and size with manifest.json (flashdit encode --verify compares" in caplog.text


def test_a_run_below_its_own_pictures_is_refused(tmp_path):
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "pictures" / "cat" / "0.png")
    below = tmp_path / "pictures" / "run"
    options = [f"data.path={tmp_path / 'pictures'}", f"run.dir={below}", "data.name=images"]
    options += ["data.image_size=32", "model.num_classes=1"]
    with pytest.raises(ValueError, match=r"run\.dir must not lie in the images of data\.path"):
        Trainer(config.load("digits", options))
    assert not below.exists()


@pytest.mark.parametrize("refused", ["a picture less", "other classes"])
def test_a_refused_start_writes_nothing(image_run, tmp_path, refused):
    if refused == "a picture less":
        trainer(image_run, f"data.path={tmp_path / 'images'}").fit()
        (tmp_path / "images/cat/0.png").unlink()
        overrides = [f"data.path={tmp_path / 'images'}", "training.steps=3"]
    else:
        overrides = [f"data.path={tmp_path / 'images'}", "model.num_classes=77"]

    def state():
        found = {path: path.stat() for path in (tmp_path / "run").rglob("*")}
        return {path: (about.st_ino, about.st_size, about.st_mtime_ns) for path, about in found.items()}

    before = state()
    with pytest.raises(ValueError, match=r"files 1 fewer|must be the number of the data's classes"):
        trainer(image_run, *overrides)
    assert state() == before


def test_a_run_of_another_task_is_refused_as_such(tiny_overrides, tmp_path):
    run_dir = tmp_path / "run"
    trainer(tiny_overrides).fit()
    before = sorted((path, path.stat().st_mtime_ns) for path in run_dir.rglob("*"))
    said = r"run holds a run of another task, whose configuration has .*flow, .*: give another run.dir"
    for eval_only in ([], ["--eval-only"]):
        with pytest.raises(ValueError, match=said):
            classify.main([*eval_only, f"run.dir={run_dir}"])
    with pytest.raises(ValueError, match=said):
        autoencoder.main([f"run.dir={run_dir}", "--images", str(tmp_path)])
    assert before == sorted((path, path.stat().st_mtime_ns) for path in run_dir.rglob("*"))


def test_of_a_run_on_another_data_set_the_data_set_is_named_and_no_option_of_it(tiny_overrides, tmp_path):
    trainer(tiny_overrides).fit()
    with pytest.raises(ValueError, match=r"run holds a run whose data.name is shards, not images: give"):
        trainer(tiny_overrides, "data.name=images", "data.background=black", "data.mirrors=true")
