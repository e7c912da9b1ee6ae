"""An exported pipeline, loaded as users of diffusers do: its code, card, defaults, formats and parts."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines import pipeline_utils
from diffusers.utils import dynamic_modules_utils
from diffusers.utils.import_utils import is_transformers_available
from torch import nn

from flashdit import FlashDiT, FlashDiTPipeline
from flashdit.sampling.checkpoint import load_generator
from flashdit.sampling.export import make_pipeline
from flashdit.sampling.options import SamplingOptions

ROOT = Path(__file__).parents[3]
SAMPLING = {"steps": 3, "cfg_scale": 2.5, "cfg_interval": (0.2, 0.9), "shift": 0.5}


@pytest.fixture(scope="module")
def generator(tiny_checkpoint):
    generator = load_generator(tiny_checkpoint)
    generator.sampling = SamplingOptions(**SAMPLING)
    return generator


@pytest.fixture(scope="module")
def exported(generator, tmp_path_factory):
    """Returns the folder of a pipeline."""
    folder = tmp_path_factory.mktemp("exported") / "birds"
    make_pipeline(generator, "birds").save_pretrained(folder)
    return folder


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, labels=0, **given):
    return quiet(pipe)(labels, generator=torch.manual_seed(0), output_type="np", **given).images


def tiny(space=None, **options):
    """Returns a small model far from zero."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "depth": 1, "num_heads": 1, "patch_size": 2, "num_classes": 3}
    model = FlashDiT(**sizes | {"sample_size": 4, "attention": {"name": "iwin", "window": 2}} | options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


def test_code_of_the_card_runs_in_a_process_that_imports_diffusers_alone(exported, tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", (exported / "README.md").read_text(), re.M | re.S)
    (alone,) = [block for block in blocks if "import flashdit" not in block and "from flashdit" not in block]
    (with_us,) = [block for block in blocks if block != alone]
    script = f"""
import socket, sys
def connect(*arguments): raise AssertionError("the network is asked")
socket.socket.connect = connect
assert "flashdit" not in sys.modules
exec({alone!r}.replace("PATH_OR_REPOSITORY", "birds"))
assert "flashdit" in sys.modules
print(type(pipe).__module__, image.size)
again = DiffusionPipeline.from_pretrained("birds", custom_pipeline="birds", trust_remote_code=True)
exec({with_us!r}.replace("PATH_OR_REPOSITORY", "birds"))
print(type(pipe) is type(again), image.size)
"""
    environment = os.environ | {"HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-W", "error::UserWarning", "-c", script]
    done = subprocess.run(command, cwd=exported.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "flashdit.sampling.pipeline (32, 32)\nTrue (32, 32)\n"
    assert "WARNING" not in done.stderr.upper()


def test_code_of_a_folder_runs_only_where_it_is_trusted(exported):
    with pytest.raises(ValueError, match=r"contains custom code in pipeline\.py"):
        DiffusionPipeline.from_pretrained(str(exported), custom_pipeline=str(exported))
    assert isinstance(DiffusionPipeline.from_pretrained(exported), FlashDiTPipeline)


@pytest.mark.parametrize("by_diffusers", [False, True])
def test_an_uploaded_export_is_loaded_by_its_hub_name(exported, tmp_path, monkeypatch, by_diffusers):
    files = [str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()]
    about = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files], sha="0" * 40)
    for module in (pipeline_utils, dynamic_modules_utils):
        monkeypatch.setattr(module, "model_info", lambda *_, **__: about)
        monkeypatch.setattr(module, "hf_hub_download", lambda _, name, **__: str(exported / name))
    monkeypatch.setattr(pipeline_utils, "_resolve_revision", lambda *_, revision, **__: revision)
    monkeypatch.setattr(pipeline_utils, "snapshot_download", lambda *_, **__: str(exported))
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which the folder is added
    name = "someone/birds"
    if by_diffusers:
        pipe = DiffusionPipeline.from_pretrained(name, custom_pipeline=name, trust_remote_code=True)
    else:
        pipe = FlashDiTPipeline.from_pretrained(name)
    assert type(pipe) is FlashDiTPipeline
    np.testing.assert_allclose(images(pipe), images(FlashDiTPipeline.from_pretrained(exported)), atol=1e-5)


def test_a_call_takes_the_stored_sampling_and_what_is_given_wins(exported, generator):
    pipe = FlashDiTPipeline.from_pretrained(exported)
    noise = generator.noise(torch.tensor([0]), 0)

    def latents(**given):
        return quiet(pipe)("hen", latents=noise, output_type="latent", **given).images

    def native(**changes):
        options = SamplingOptions(**SAMPLING | changes)
        return generator.latents(torch.tensor([0]), torch.tensor([2]), options)[0]

    torch.testing.assert_close(latents(), native(), rtol=0, atol=1e-4)
    for given, changes in (
        ({"num_inference_steps": 7}, {"steps": 7}),
        ({"guidance_scale": 1.0}, {"cfg_scale": 1.0}),
        ({"guidance_scale": 0.0}, {"cfg_scale": 0.0}),
        ({"guidance_interval": (0.0, 1.0)}, {"cfg_interval": (0.0, 1.0)}),
    ):
        found = latents(**given)
        torch.testing.assert_close(found, native(**changes), rtol=0, atol=1e-4)
        assert (found - latents()).abs().max() > 1e-3
    with pytest.raises(ValueError, match="num_inference_steps must be at least 1, got 0"):
        latents(num_inference_steps=0)
    steps = []
    latents(callback_on_step_end=lambda pipe, step, *_: steps.append((step, pipe.guidance_scale)) or {})
    assert steps == [(0, 2.5), (1, 2.5), (2, 2.5)]


def test_a_folder_without_defaults_has_those_of_before(exported, tmp_path):
    pipe = FlashDiTPipeline.from_pretrained(exported)
    pipe.register_to_config(call_defaults=None)
    pipe.save_pretrained(tmp_path / "old")
    old = FlashDiTPipeline.from_pretrained(tmp_path / "old")
    same = images(pipe, num_inference_steps=50, guidance_scale=1.0, guidance_interval=(0.0, 1.0))
    np.testing.assert_allclose(images(old), same, atol=1e-5)
    assert old.num_timesteps == 50


def test_a_default_of_no_argument_is_named(generator):
    parts = dict(make_pipeline(generator).components)
    with pytest.raises(ValueError, match="unknown default of a call 'steps'"):
        FlashDiTPipeline(**parts, call_defaults={"steps": 3})


def test_an_output_type_that_is_none_is_refused_before_sampling(generator):
    pipe = quiet(make_pipeline(generator))
    with pytest.raises(ValueError, match="unknown output_type 'jpg'"):
        pipe(0, output_type="jpg")
    assert pipe.num_timesteps == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_loading_gives_nearly_the_same_images(exported, dtype):
    full = images(FlashDiTPipeline.from_pretrained(exported), guidance_scale=1.0)
    pipe = DiffusionPipeline.from_pretrained(exported, dtype=dtype)
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (dtype, dtype)
    half = images(pipe, guidance_scale=1.0)
    assert half.dtype == np.float32
    assert 0 < abs(half - full).max() < 0.2
    assert pipe.to("cpu", torch.float32).transformer.dtype == torch.float32


@pytest.mark.parametrize(
    ("saved", "loaded", "weights"),
    [
        ({"safe_serialization": False}, {}, "diffusion_pytorch_model.bin"),
        ({"variant": "fp16"}, {"variant": "fp16"}, "diffusion_pytorch_model.fp16.safetensors"),
        ({"max_shard_size": "40KB"}, {}, "diffusion_pytorch_model.safetensors.index.json"),
    ],
)
def test_every_format_that_diffusers_writes_is_saved_again_and_loaded(
    exported, tmp_path, saved, loaded, weights
):
    pipe = FlashDiTPipeline.from_pretrained(exported)
    pipe.save_pretrained(tmp_path / "again", **saved)
    assert (tmp_path / "again" / "transformer" / weights).is_file()
    again = DiffusionPipeline.from_pretrained(tmp_path / "again", **loaded)
    np.testing.assert_allclose(images(again), images(pipe), atol=1e-5)
    for name in ("README.md", "pipeline.py", "model_index.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()


def test_parts_may_be_offloaded_and_none_is_encoded_with_in_a_call(exported, monkeypatch):
    pipe = FlashDiTPipeline.from_pretrained(exported)
    expected = images(pipe)
    monkeypatch.setattr(type(pipe.vae), "encode", None)
    pipe.enable_model_cpu_offload(device="cpu")
    np.testing.assert_allclose(images(pipe), expected, atol=1e-5)
    monkeypatch.undo()
    pipe = FlashDiTPipeline.from_pretrained(exported)
    pipe.vae = diffusers.AutoencoderTiny(**NETWORKS["AutoencoderTiny"], latent_channels=1)
    assert images(pipe).shape == (1, 64, 64, 3)  # its factor is 4, that of the one before is 2


BLOCK = {"block_out_channels": (4, 4), "norm_num_groups": 2}
BLOCK |= {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
DEEP = {"block_types": ("ResBlock",) * 2, "block_out_channels": (8, 8), "layers_per_block": (1, 1)}
DEEP |= {"qkv_multiscales": ((), ())}
NETWORKS = {
    "AutoencoderKLFlux2": BLOCK | {"sample_size": 32},
    "AutoencoderDC": {f"{side}_{key}": DEEP[key] for side in ("encoder", "decoder") for key in DEEP},
    "AutoencoderTiny": {f"{side}_block_out_channels": (4, 4, 4) for side in ("encoder", "decoder")}
    | {f"num_{side}_blocks": (1, 1, 1) for side in ("encoder", "decoder")},
    "VQModel": BLOCK,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_each_kind_of_autoencoder_decodes_after_loading(name, tmp_path):
    torch.manual_seed(0)
    vae = getattr(diffusers, name)(**NETWORKS[name], latent_channels=4).eval()
    statistics = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [2.0, 1.0, 0.5, 3.0]}
    parts = {"transformer": tiny(in_channels=4), "scheduler": FlowMatchEulerDiscreteScheduler()}
    FlashDiTPipeline(vae=vae, **parts, **statistics, latents_multiplier=0.5).save_pretrained(tmp_path)
    pipe = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(pipe.vae).__name__ == name
    noise = torch.randn(2, 4, 4, 4, generator=torch.manual_seed(0))
    latents = pipe([0, 2], latents=noise, num_inference_steps=2, output_type="latent").images
    mean, std = (torch.tensor(statistics[key]).reshape(1, 4, 1, 1) for key in statistics)
    with torch.no_grad():
        expected = (vae.decode(latents / 0.5 * std + mean, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
    made = pipe([0, 2], latents=noise, num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not is_transformers_available(), reason="AutoencoderRAE requires transformers")
def test_an_autoencoder_of_one_image_size_decodes_after_loading(tmp_path):
    sizes = {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "encoder_input_size": 28}
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    vae = diffusers.AutoencoderRAE(**sizes, **decoder, decoder_intermediate_size=16, patch_size=8).eval()
    model = tiny(in_channels=64, sample_size=2, attention={"name": "global", "rope": True}, patch_size=1)
    FlashDiTPipeline(model, vae, FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path)
    pipe = FlashDiTPipeline.from_pretrained(tmp_path)
    assert images(pipe, num_inference_steps=1).shape == (1, 16, 16, 3)
    with pytest.raises(ValueError, match="takes images of 16×16 alone, got 32×16"):
        pipe(0, width=32)


def test_a_model_of_pixels_that_predicts_the_data_is_saved_and_described(tmp_path):
    model = tiny(in_channels=3, sample_size=8, prediction="data")
    FlashDiTPipeline(model, None, FlowMatchEulerDiscreteScheduler(), latents_space="pixels").save_pretrained(
        tmp_path
    )
    card = (tmp_path / "README.md").read_text()
    assert "A class-conditional diffusion transformer trained" in card
    assert "pixels 3×8×8, predicted: data." in card
    pipe = quiet(DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert pipe.vae is None
    assert images(pipe, num_inference_steps=2).shape == (1, 8, 8, 3)
    pipe = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    noise = torch.randn(1, 3, 8, 8, generator=torch.manual_seed(0))
    with torch.no_grad():
        v = model(noise, torch.zeros(1), torch.tensor([1]))  # one Euler step from t = 0 to 1
    made = pipe(1, latents=noise, num_inference_steps=1, output_type="pt").images
    torch.testing.assert_close(made, ((noise + v) / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


def test_classes_of_imagenet_go_by_word_and_the_card_lists_words():
    model = tiny(in_channels=3, num_classes=1000)
    pipe = FlashDiTPipeline(model, None, FlowMatchEulerDiscreteScheduler(), latents_space="pixels")
    for given in (207, "207", "n02099601", "golden retriever", "Golden Retriever"):
        assert pipe.label_ids(given) == [207]
    card = pipe.card()
    assert "1,000 classes: tench, goldfish, great white shark," in card
    assert "    'tench', guidance_scale" in card


@pytest.mark.parametrize("first", ["crane", "all"])
def test_the_example_of_the_card_is_a_number_where_a_word_is_not_one_class(first):
    parts = (tiny(in_channels=3), None, FlowMatchEulerDiscreteScheduler())
    names = {"0": first, "1": "crane", "2": "hen"}
    pipe = FlashDiTPipeline(*parts, id2label=names, latents_space="pixels")
    assert "    0, guidance_scale" in pipe.card()


def test_a_model_without_classes_has_a_card_whose_call_works():
    model = tiny(in_channels=3, num_classes=0)
    pipe = quiet(FlashDiTPipeline(model, None, FlowMatchEulerDiscreteScheduler(), latents_space="pixels"))
    assert "An unconditional diffusion transformer" in pipe.card()
    assert "    0, guidance_scale" in pipe.card()
    assert len(pipe(0, num_inference_steps=1).images) == 1


def test_the_files_name_what_a_repository_may_name_and_no_folder_of_this_machine(exported, tiny_checkpoint):
    texts = [path.read_text() for path in [*exported.glob("*.*"), *exported.glob("*/*.json")]]
    assert len(texts) == 6
    assert not [text for text in texts if str(tiny_checkpoint) in text or str(ROOT) in text]
    index = json.loads((exported / "model_index.json").read_text())
    assert index["_class_name"] == "FlashDiTPipeline"
    assert index["transformer"] == ["diffusers", "FlashDiT"]
    assert index["recipe"]["sampling"]["steps"] == index["call_defaults"]["num_inference_steps"] == 3
