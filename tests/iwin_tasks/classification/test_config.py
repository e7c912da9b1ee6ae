import pytest
import torch
import yaml

from flashdit.shared.settings import SHIPPED_CONFIGS, to_yaml
from iwin_tasks.classification import config
from iwin_tasks.classification.model import make_model

FOLDER = SHIPPED_CONFIGS / "iwin"
PATHS = sorted(path for path in FOLDER.glob("*.yaml") if " classify" in path.read_text())
TRAIN_1K, TRAIN_22K = 1_281_167, 14_197_122
PARAMETERS = {  # TARGETS.md; of 22K the same but for its head
    "tiny_224": 30_226_504,
    "small_224": 51_566_152,
    "small_384": 51_566_152,
    "small_512": 51_566_152,
    "small_1024": 51_581_512,
    "base_224": 91_241_576,
    "base_384": 91_241_576,
    "base_512": 91_241_576,
    "base_1024": 91_262_056,
    "base_224_22k": 91_241_576 + (21_841 - 1000) * (1024 + 1),
    "base_224_22kto1k": 91_241_576,
    "large_224_22k": 204_322_984 + (21_841 - 1000) * (1536 + 1),
    "large_224_22kto1k": 204_322_984,
}
SIDES = {"224": 7, "384": 12, "512": 16, "1024": 16}


def load(name, overrides=()):
    needs_path = name not in ("digits_32", "digits_64")
    return config.load_classifier_config(
        FOLDER / f"{name}.yaml", [*(["data.path=somewhere"] if needs_path else []), *overrides]
    )


def test_digits_at_32_is_the_default_and_reads_back_from_its_yaml(tmp_path):
    loaded = config.load_classifier_config()
    assert loaded == load("digits_32")
    (tmp_path / "saved.yaml").write_text(to_yaml(loaded))
    assert config.load_classifier_config(tmp_path / "saved.yaml") == loaded


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_builds_and_opens_with_its_command(path):
    loaded = load(path.stem)
    assert loaded.run.dir == f"runs/iwin_{path.stem}"
    opening = path.read_text().splitlines()[:4]
    assert any("classify" in line for line in opening), "a YAML opens with its command"
    assert any("parameters" in line for line in opening), "and its cost"
    if loaded.weights is not None:
        runs = {yaml.safe_load(other.read_text())["run"]["dir"] for other in PATHS}
        assert loaded.weights in runs, "it starts from what another one trains"
    with torch.device("meta"):
        model = make_model(loaded.model)
    if path.stem in PARAMETERS:
        assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[path.stem]
        _, side, *_ = path.stem.split("_")
        assert (model.config.img_size, model.config.window_size) == (int(side), SIDES[side])
    else:
        assert path.stem in ("digits_32", "digits_64", "small_64")


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_steps_are_the_papers_epochs(name):
    loaded = load(name)
    training, optimizer = loaded.training, loaded.optimizer
    images = TRAIN_22K if name.endswith("_22k") else TRAIN_1K
    steps_of_epoch = images / training.global_batch_size
    scratch, pretraining = name in ("tiny_224", "small_224", "base_224"), name.endswith("_22k")
    epochs, warmup, lr, decay = (
        (300, 20, 5e-4, 0.05)
        if scratch
        else (90, 5, 1.25e-4, 0.05)
        if pretraining
        else (30, 0 if name.endswith("22kto1k") else 5, 2e-5, 1e-8)
    )
    assert training.steps == round(epochs * steps_of_epoch)
    assert optimizer.warmup_steps == round(warmup * steps_of_epoch)
    assert optimizer.decay_steps == (training.steps if scratch or pretraining else None)
    assert (optimizer.lr, optimizer.weight_decay) == (lr, decay)


def test_digits_at_64_change_the_input_size_and_the_window_alone():
    small, large = load("digits_32"), load("digits_64")
    different = {key for key in small.model if small.model[key] != large.model[key]}
    assert different == {"img_size", "window_size"}
    assert small.model.keys() == large.model.keys()
    assert small.augmentation == large.augmentation
    assert large.weights == small.run.dir


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "augmentation.mixp=1",
            r"unknown configuration key 'augmentation.mixp'; did you mean 'augmentation.mix",
        ),
        ("augmentation.hflip=2", r"augmentation.hflip must be from 0 to 1, got 2"),
        ("model.window=4", r"unknown configuration key 'model.window'; did you mean 'model.window_size'"),
        ("model.name=iwin_teeny", r"unknown model 'iwin_teeny' .*known: iwin_base"),
        ("data.name=digit", r"unknown data 'digit'; did you mean 'digits'\? \(known: digits, images\)"),
        ("data.name=images", r"data 'images' needs the option 'path'"),
        ("latents.vae=x", r"unknown configuration key 'latents'"),
        ("run.dir=''", r"run.dir must not be empty, got ''"),
        ("training.steps=0", r"training.steps must be at least 1, got 0"),
        ("training.steps=99999", r"must not pass optimizer.decay_steps"),
        ("seed=-1", r"seed must be from 0 to below 2\^63, got -1"),
    ],
)
def test_configurations_that_cannot_be_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        config.load_classifier_config(None, [override])
