import pytest
import torch

from flashdit.shared.settings import SHIPPED_CONFIGS, to_yaml
from iwin_core import IwinFeatures
from iwin_tasks.segmentation.config import load_segmentation_config
from iwin_tasks.segmentation.start import make_segmenter

FOLDER = SHIPPED_CONFIGS / "iwin"
PATHS = sorted(path for path in FOLDER.glob("*.yaml") if " segment" in path.read_text())
PARAMETERS = {  # of mmsegmentation
    "upernet_tiny": 61_880_012,
    "upernet_small": 83_219_660,
    "upernet_base": 124_753_068,
    "semantic_fpn_tiny": 33_831_990,
    "semantic_fpn_small": 55_171_638,
    "semantic_fpn_base": 94_714_390,
}


def load(name, *overrides):
    path = [] if name == "segment_scenes" else ["data.path=somewhere"]
    return load_segmentation_config(FOLDER / f"{name}.yaml", [*path, *overrides])


def test_scenes_are_the_default_and_a_path_means_the_papers_smallest(tmp_path):
    loaded = load_segmentation_config()
    assert loaded == load("segment_scenes")
    (tmp_path / "saved.yaml").write_text(to_yaml(loaded))
    assert load_segmentation_config(tmp_path / "saved.yaml") == loaded
    assert load_segmentation_config(None, ["data.path=somewhere"]) == load("upernet_tiny")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_builds_and_opens_with_its_command(path):
    loaded = load(path.stem)
    assert loaded.run.dir == f"runs/iwin_{path.stem}"
    opening = path.read_text().splitlines()[:4]
    assert any("iwin segment" in line or "iwin_tasks segment" in line for line in opening)
    assert any("parameters" in line for line in opening), "and its cost"
    model = make_segmenter(loaded.model, device="meta")
    assert isinstance(model.backbone, IwinFeatures)
    if path.stem != "segment_scenes":
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[path.stem]
        assert model.backbone.config.drop_path_rate == 0.3
        assert next(model.parameters()).device == torch.device("meta")


def test_all_recipes_of_the_paper_are_there():
    assert {path.stem for path in PATHS} == {*PARAMETERS, "segment_scenes"}


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_recipes_are_those_of_mmsegmentation(name):
    loaded = load(name)
    augmentation, optimizer, training = loaded.augmentation, loaded.optimizer, loaded.training
    uper = name.startswith("upernet")
    steps, lr, decay, power = (160_000, 6e-5, 0.01, 1.0) if uper else (80_000, 1e-4, 1e-4, 0.9)
    assert (training.steps, optimizer.decay_steps, training.global_batch_size) == (steps, steps, 16)
    assert (optimizer.lr, optimizer.weight_decay, optimizer.schedule, optimizer.decay_power) == (
        lr,
        decay,
        "poly",
        power,
    )
    assert tuple(optimizer.betas) == (0.9, 0.999)
    assert (optimizer.warmup_steps, optimizer.warmup_start) == ((1500, 1e-6) if uper else (0, 0))
    assert (augmentation.scale, augmentation.crop) == ((2048, 512), (512, 512))
    assert augmentation.ratio == (0.5, 2.0)
    assert (augmentation.cat_max_ratio, augmentation.hflip, augmentation.photometric) == (0.75, 0.5, 0.5)
    assert loaded.data == {"name": "ade20k", "path": "somewhere"}
    assert (loaded.inference.window, loaded.inference.scales, loaded.inference.flip) == (None, [1.0], False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "augmentation.crops=1",
            r"unknown configuration key 'augmentation.crops'; did you mean",
        ),
        ("model.kind=upernets", r"unknown segmenter 'upernets'; did you mean 'upernet'"),
        (
            "model.backbone=iwin_teeny",
            "backbone must be .* a name that timm knows, got 'iwin_teeny'",
        ),
        ("model.backbone_options.window=4", "must be fields of IwinConfig, got window"),
        ("model.backbone_options.pretrained=true", "must load no weights, .* got pretrained"),
        ("model.channels=0", "channels at least 1"),
        ("data.name=scene", r"unknown data 'scene'; did you mean 'scenes'\? \(known: ade20k, scenes\)"),
        ("data.name=ade20k", "data 'ade20k' needs the option 'path'"),
        ("data.digits=[3,1]", "data.digits must be 0 ≤ least ≤ most"),
        ("inference.window=[4]", "window"),
        ("inference.stride=[4,4]", r"stride needs a window, got \[4, 4\] without"),
        ("inference.scales=[]", r"scales must be positive numbers, at least one, got \[\]"),
        ("class_weights=[1.0]", r"class_weights must be 11 positive numbers, one a class, got \[1.0\]"),
        ("class_weights=[0,1,1,1,1,1,1,1,1,1,1]", "class_weights must be 11 positive numbers"),
        ("run.dir=''", r"run.dir must not be empty, got ''"),
        ("training.steps=0", r"training.steps must be at least 1, got 0"),
    ],
)
def test_configurations_that_cannot_be_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_segmentation_config(None, [override])


@pytest.mark.parametrize(("option", "value"), [("ignore", -1), ("offset", -1), ("background", "none")])
def test_options_of_label_folders_are_checked(option, value):
    with pytest.raises(ValueError, match=option):
        load_segmentation_config(None, ["data.path=somewhere", f"data.{option}={value}"])
