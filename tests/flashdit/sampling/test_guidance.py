"""Guidance from the options to the images: autoguidance by another checkpoint, and on some channels alone."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch import nn

from flashdit import FlashDiT, FlashDiTPipeline
from flashdit.commands import evaluate, export, sample, sweep
from flashdit.data.latents import LatentOptions, LatentSpace
from flashdit.sampling.checkpoint import load_generator
from flashdit.sampling.export import make_pipeline
from flashdit.sampling.generator import ImageGenerator
from flashdit.sampling.options import SamplingOptions
from flashdit.sampling.recipe import digest, identity, make_recipe

LABELS, IDS = torch.tensor([2, 0]), torch.tensor([4, 9])
OPTIONS = {"steps": 5, "cfg_scale": 2.5, "cfg_interval": (0.2, 0.7)}


@pytest.fixture
def worse(tiny_checkpoint, tmp_path):
    """Returns the checkpoint of a worse model: the raw weights of the tiny one, at an earlier step."""
    folder = tmp_path / "worse" / "checkpoints" / "step_00000003"
    shutil.copytree(tiny_checkpoint, folder)
    shutil.rmtree(folder / "ema")
    shutil.copytree(folder / "model", folder / "ema")
    change_state(folder, step=3)
    return folder


@pytest.fixture
def guided(tiny_checkpoint, worse):
    """Returns the generator of the tiny checkpoint with the worse one as its guide."""
    generator = load_generator(tiny_checkpoint)
    generator.guide_by(load_generator(worse))
    return generator


def change_state(folder, **changes):
    state = json.loads((folder / "state.json").read_text()) | changes
    (folder / "state.json").write_text(json.dumps(state))


def euler(generator, velocity, steps=5):
    """Returns the latents of five Euler steps of a velocity (x, t) from the generator's noise."""
    x = generator.noise(IDS, 0)
    for step in range(steps):
        x = x + velocity(x, torch.full((2,), step / steps)) / steps
    return x


@torch.no_grad()
@pytest.mark.parametrize("scale", [2.5, 0.0])
def test_autoguidance_extrapolates_from_the_guide_inside_the_interval(guided, scale):
    main, guide = guided.model, guided.guide.model

    def velocity(x, t):
        v = main(x, t, LABELS)
        if 0.2 <= round(t[0].item(), 6) <= 0.7:
            v = scale * v + (1 - scale) * guide(x, t, LABELS)
        return v

    latents, count = guided.latents(IDS, LABELS, options := SamplingOptions(**OPTIONS | {"cfg_scale": scale}))
    torch.testing.assert_close(latents, euler(guided, velocity), rtol=0, atol=1e-5)
    assert count.tolist() == [options.nfe] * 2 == [5 + 3 * (scale > 0)] * 2  # at t = 0.2, 0.4 and 0.6 twice


def test_autoguidance_asks_neither_model_without_a_class(guided, monkeypatch):
    asked = []
    for generator in (guided, guided.guide):
        forward = generator.model.forward
        monkeypatch.setattr(
            generator.model, "forward", lambda x, t, y, f=forward: asked.append(y.tolist()) or f(x, t, y)
        )
    list(guided.generate(LABELS, SamplingOptions(**OPTIONS)))
    assert asked == [[2, 0]] * (2 + 2 * 3)


def test_a_guide_spares_the_warning_of_an_untrained_null_label(guided, caplog):
    for generator in (guided, guided.guide):
        generator.model.class_dropout_prob = 0.0
    list(guided.generate(LABELS, SamplingOptions(**OPTIONS)))
    assert not caplog.records


def of_pixels():
    """Returns a generator of RGB images in three classes, its model far from zero."""
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "in_channels": 3, "patch_size": 2, "hidden_size": 16, "depth": 1}
    model = FlashDiT.from_size("nano", **sizes, num_classes=3).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return ImageGenerator(model, LatentSpace.of_pixels(LatentOptions(space="pixels")), ["a", "b", "c"])


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_guided_channels_are_those_of_dits_forward_with_cfg(channels):
    generator = of_pixels()

    def forward_with_cfg(x, t, y, cfg_scale):  # facebookresearch/DiT, where `channels` is 3
        half = x[: len(x) // 2]
        model_out = generator.model(torch.cat([half, half]), t, y)
        eps, rest = model_out[:, :channels], model_out[:, channels:]
        cond_eps, uncond_eps = torch.split(eps, len(eps) // 2)
        half_eps = uncond_eps + cfg_scale * (cond_eps - uncond_eps)
        return torch.cat([torch.cat([half_eps, half_eps]), rest], dim=1)

    def velocity(x, t):
        both = forward_with_cfg(x.repeat(2, 1, 1, 1), t.repeat(2), torch.tensor([2, 0, 3, 3]), 4.0)
        return both[:2]

    options = SamplingOptions(steps=5, cfg_scale=4.0, cfg_channels=channels)
    latents, count = generator.latents(IDS, LABELS, options)
    torch.testing.assert_close(latents, euler(generator, velocity), rtol=0, atol=1e-5)
    assert count.tolist() == [options.nfe] * 2 == [10, 10]


def test_scale_zero_on_some_channels_takes_both_velocities():
    options = SamplingOptions(steps=5, cfg_scale=0.0, cfg_channels=1)
    _, count = of_pixels().latents(IDS, LABELS, options)
    assert count.tolist() == [options.nfe] * 2 == [10, 10]


def test_what_a_title_says_of_guidance():
    assert str(SamplingOptions(cfg_scale=6.7, cfg_channels=3)) == "euler 50, guidance 6.7 on 3 channels"
    assert str(SamplingOptions(cfg_channels=3)) == "euler 50, guidance 1"


def test_more_channels_than_the_model_has_are_refused(tiny_checkpoint, exit_message, tiny_overrides):
    from flashdit.commands import train

    message = exit_message(sample, "--checkpoint", tiny_checkpoint, "--cfg-channels", 3)
    assert "cfg_channels must be 1 to the model's 1 channels, got 3" in message
    message = exit_message(train, "--config", "digits", *tiny_overrides, "sampling.cfg_channels=4")
    assert "sampling.cfg_channels must be 1 to the model's 3 channels, got 4" in message
    pipe = make_pipeline(load_generator(tiny_checkpoint))
    with pytest.raises(ValueError, match="guidance_channels must be 1 to the model's 1 channels, got 2"):
        pipe(0, guidance_channels=2)
    with pytest.raises(ValueError, match="cfg_channels must be at least 1, got 0"):
        SamplingOptions(cfg_channels=0)


def test_records_of_before_guided_channels_are_the_same_recipe(tiny_checkpoint):
    generator = load_generator(tiny_checkpoint)
    recipe = make_recipe(generator, LABELS, SamplingOptions())
    before = json.loads(json.dumps(recipe))
    del before["sampling"]["cfg_channels"]
    assert digest(before, LABELS) == digest(recipe, LABELS)
    other = make_recipe(generator, LABELS, SamplingOptions(cfg_scale=2.0, cfg_channels=1))
    assert identity(other)["sampling"]["cfg_channels"] == 1


def saved_space(folder, **changes):
    space = LatentSpace.read(folder / "latents.safetensors")
    for name, value in changes.items():
        setattr(space.options if name == "multiplier" else space, name, value)
    space.save(folder / "latents.safetensors")


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda folder: change_state(folder, class_names=["cat", "hen", "dog"]), "classes"),
        (lambda folder: saved_space(folder, mean=torch.full((1, 1, 1, 1), 0.2)), "latents' mean"),
        (lambda folder: saved_space(folder, std=torch.full((1, 1, 1, 1), 2.0)), "latents' std"),
        (lambda folder: saved_space(folder, multiplier=1.0), "latents.multiplier"),
        (lambda folder: save_sized(folder, sample_size=8), "sample size"),
    ],
)
def test_a_guide_of_other_latents_or_classes_is_refused(tiny_checkpoint, worse, change, rule):
    change(worse)
    guide = load_generator(worse)
    with pytest.raises(ValueError, match=f"^--guide must have the {rule} of the model that it guides, "):
        load_generator(tiny_checkpoint).guide_by(guide)


def save_sized(folder, **sizes):
    config = {"in_channels": 1, "patch_size": 2, "hidden_size": 16, "depth": 1, "num_classes": 3}
    FlashDiT.from_size("nano", **config | sizes).save_pretrained(folder / "ema")


def test_a_guide_may_be_of_another_architecture(tiny_checkpoint, worse):
    save_sized(worse, depth=1, hidden_size=8, num_heads=1)
    generator = load_generator(tiny_checkpoint)
    generator.guide_by(load_generator(worse))
    assert next(generator.generate(LABELS, SamplingOptions(steps=2, cfg_scale=2.0))).images.shape[0] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--guide", "{main}"], "--guide must be another model than the one that it guides, got the weights"),
        (["--guide", "{worse}", "--cfg-scale", 1], "--guide requires a --cfg-scale other than 1"),
        (["--guide", "{nowhere}"], "--guide: "),
        (["--guide-ema", "model"], "--guide-ema requires --guide, got model alone"),
        (["--guide", "{worse}", "--guide-ema", "emma"], "unknown weights of"),
    ],
)
def test_a_guide_that_cannot_be_is_one_sentence(
    tiny_checkpoint, worse, tmp_path, exit_message, words, message
):
    places = {"main": tiny_checkpoint, "worse": worse, "nowhere": tmp_path / "nowhere"}
    words = [str(word).format(**places) for word in words]
    assert message in exit_message(sample, "--checkpoint", tiny_checkpoint, *words)


def test_the_same_checkpoints_other_weights_can_guide(tiny_checkpoint, tmp_path):
    words = ["--checkpoint", tiny_checkpoint, "--guide", tiny_checkpoint, "--guide-ema", "model"]
    sample.main([str(word) for word in (*words, "--num-images", 1, "--output", tmp_path / "out")])
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert (recipe["weights"], recipe["guide_weights"], recipe["guide_step"]) == ("ema", "model", 7)


def test_a_folder_of_another_guide_is_refused_and_a_moved_guide_is_the_same(
    tiny_checkpoint, worse, tmp_path, exit_message
):
    words = ["--checkpoint", tiny_checkpoint, "--num-images", 2, "--output", tmp_path / "out"]
    sample.main([str(word) for word in (*words, "--guide", worse)])
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["guide_checkpoint"] == str(worse)
    assert recipe["guide_weights_sha256"] == load_generator(worse).weights_sha256
    assert recipe["title"].endswith(f"guidance 1.5, guided by step 3 ({recipe['guide_weights_sha256'][:8]})")
    assert "guide_step, guide_weights, guide_weights_sha256, title" in exit_message(sample, *words)
    worse.parents[1].rename(tmp_path / "moved")
    sample.main([str(word) for word in (*words, "--guide", tmp_path / "moved")])


@pytest.fixture
def scored(tiny_checkpoint, worse, tmp_path):
    """Returns a function that calls a command of scoring with the guide, against six digits."""
    from flashdit.digits.images import digits

    images, _ = digits("held-out")
    np.savez(tmp_path / "reference.npz", images[:6].permute(0, 2, 3, 1).numpy())
    words = ["--reference", tmp_path / "reference.npz", "--extractor", "digits", "--num-images", 4]
    words += ["--steps", 2, "--metrics", "fid", "--no-cache", "--device", "cpu"]

    def call(command, *options, guide=worse):
        guide = [] if guide is None else ["--guide", guide]
        command.main([str(word) for word in ("--checkpoint", tiny_checkpoint, *words, *guide, *options)])

    return call


def test_scores_and_tables_name_the_guide(scored, tmp_path, worse):
    scored(evaluate, "--output", tmp_path / "eval", "--csv", tmp_path / "scores.csv")
    result = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert result["samples"]["guide_step"] == 3
    assert ", guided by step 3 (" in (tmp_path / "eval" / "metrics.md").read_text()
    header, row = (line.split(",") for line in (tmp_path / "scores.csv").read_text().splitlines())
    assert dict(zip(header, row, strict=True))["guide"] == f"{worse}/ema"
    scored(evaluate, "--output", tmp_path / "eval", "--csv", tmp_path / "scores.csv", guide=None)
    row = (tmp_path / "scores.csv").read_text().splitlines()[2].split(",")
    assert dict(zip(header, row, strict=True))["guide"] == ""


def test_a_table_without_a_column_for_the_guide_is_refused(scored, tmp_path):
    scored(evaluate, "--output", tmp_path / "eval", "--csv", tmp_path / "scores.csv", guide=None)
    with pytest.raises(ValueError, match=r"must be a new file or have a column for every value, .* guide$"):
        scored(evaluate, "--output", tmp_path / "eval", "--csv", tmp_path / "scores.csv")


def test_a_sweep_with_a_guide_is_another_one_than_without(scored, tmp_path):
    scored(sweep, "--cfg-scale", "1,2", "--output", tmp_path / "sweep")
    scored(sweep, "--cfg-scale", "1,2", "--output", tmp_path / "sweep", guide=None)
    content = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    (other,) = content["others"]
    assert "guided by step 3" in other["title"]
    assert "guided by" not in content["title"]
    plain, guided = ([point["metrics"]["fid"] for point in one["points"]] for one in (content, other))
    assert plain[0] == guided[0], "at scale 1 nothing guides"
    assert plain[1] != guided[1]


@pytest.mark.parametrize("options", [OPTIONS, OPTIONS | {"cfg_scale": 0.0}])
def test_a_pipeline_with_a_guide_draws_the_same_images(guided, tmp_path, options):
    options = SamplingOptions(**options)
    native, _ = guided.latents(IDS, LABELS, options)
    make_pipeline(guided).save_pretrained(tmp_path / "out")
    pipe = FlashDiTPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    how = {"guidance_scale": options.cfg_scale, "guidance_interval": options.cfg_interval}
    latents = pipe(
        LABELS, latents=guided.noise(IDS, 0), num_inference_steps=5, output_type="latent", **how
    ).images
    torch.testing.assert_close(latents, native, rtol=0, atol=1e-4)


def test_a_pipeline_guides_the_channels_that_its_run_does():
    generator = of_pixels()
    pipe = FlashDiTPipeline(generator.model, None, scheduler(), latents_space="pixels")
    pipe.set_progress_bar_config(disable=True)
    how = {"latents": generator.noise(IDS, 0), "num_inference_steps": 5, "output_type": "latent"}
    for channels in (None, 2):
        options = SamplingOptions(steps=5, cfg_scale=4.0, cfg_channels=channels)
        native, _ = generator.latents(IDS, LABELS, options)
        latents = pipe(LABELS, guidance_scale=4.0, guidance_channels=channels, **how).images
        torch.testing.assert_close(latents, native, rtol=0, atol=1e-4)
    stored = FlashDiTPipeline(
        generator.model,
        None,
        scheduler(),
        latents_space="pixels",
        call_defaults={"guidance_scale": 4.0, "guidance_channels": 2},
    )
    stored.set_progress_bar_config(disable=True)
    assert stored(LABELS, **how).images.equal(latents)


def scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler()


def test_a_guide_that_does_not_fit_the_pipeline_is_refused(guided):
    other = FlashDiT.from_size("nano", in_channels=1, patch_size=2, hidden_size=16, depth=1, num_classes=4)
    parts = make_pipeline(guided).components | {"guide": other}
    with pytest.raises(ValueError, match="guide must have the transformer's num_classes, got 4 for 3"):
        FlashDiTPipeline(**parts)


def test_an_export_holds_the_guide_and_the_scores_with_it(tiny_checkpoint, worse, tmp_path):
    run = tmp_path / "birds"
    shutil.copytree(tiny_checkpoint.parents[1], run)
    mine, theirs = (load_generator(path).weights_sha256 for path in (run, worse))
    for name, fid, guide in (("plain", 5.5, {}), ("guided", 4.25, {"guide_weights_sha256": theirs})):
        path = run / "eval" / name / "metrics.json"
        path.parent.mkdir(parents=True)
        samples = {"weights_sha256": mine, "summary": name, **guide}
        scores = {"metrics": {"fid": fid}, "num_images": 8, "reference": {"name": "x"}, "samples": samples}
        path.write_text(json.dumps(scores))
    export.main([str(run), str(tmp_path / "out"), "--guide", str(worse)])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| fid | 4.25 |" in card
    assert "away from the model in `guide/`" in card
    assert f"SHA-256 of the guide: {theirs}" in card
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["guide"] == ["diffusers", "FlashDiT"]
    assert str(tmp_path) not in json.dumps(index)
    pipe = FlashDiTPipeline.from_pretrained(tmp_path / "out")
    ours = dict(load_generator(worse).model.named_parameters())
    assert all(value.equal(ours[name]) for name, value in pipe.guide.named_parameters())

    export.main([str(run), str(tmp_path / "out")])
    assert "| fid | 5.5 |" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "guide").exists()
    guide = load_generator(worse).model
    assert FlashDiTPipeline.from_pretrained(tmp_path / "out", guide=guide).guide is guide
    assert "guide" not in json.loads((tmp_path / "out" / "model_index.json").read_text())


def test_processes_that_read_different_guides_are_refused(guided, tmp_path, monkeypatch):
    from types import SimpleNamespace

    from flashdit.sampling import run

    folder = run.open_folder(guided, LABELS, SamplingOptions(steps=1), tmp_path / "out")
    monkeypatch.setattr(run, "gather_object", lambda mine: [*mine, mine[0] | {"guide_checkpoint": "step_9"}])
    process = SimpleNamespace(process_index=0, num_processes=2, is_main_process=True)
    with pytest.raises(ValueError, match=r"one checkpoint, got .*step_00000003 and .* guided by step_9:"):
        run.fill(folder, guided, SamplingOptions(steps=1), process)
