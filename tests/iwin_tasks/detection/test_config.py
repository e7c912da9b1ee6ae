import pytest
import torch

from flashdit.shared.settings import SHIPPED_CONFIGS, to_yaml
from flashdit.training.optim import learning_rate
from iwin_tasks.detection.config import load_detection_config
from iwin_tasks.detection.detector import Detector
from iwin_tasks.detection.model import make_detector

FOLDER = SHIPPED_CONFIGS / "iwin"
PATHS = sorted(path for path in FOLDER.glob("*.yaml") if " detect" in path.read_text())
STEPS_OF_EPOCH = 7393  # 118,287 images by 16
PARAMETERS = {
    ("mask", "tiny"): 49_732_752,
    ("mask", "small"): 71_072_400,
    ("cascade", "tiny"): 87_567_954,
    ("cascade", "small"): 108_907_602,
}
TABLES = {
    "tiny": 2 * 3 + 2 * 6 + 6 * 12 + 2 * 24,
    "small": 2 * 3 + 2 * 6 + 18 * 12 + 2 * 24,
}  # heads of all blocks
DROP_PATHS = {
    "mask_rcnn_tiny_1x": 0.1,
    "mask_rcnn_tiny_1x_cosine": 0.1,
    "mask_rcnn_tiny_1x_lr2": 0.1,
    "mask_rcnn_tiny_1x_relative": 0.1,
    "cascade_tiny_1x": 0.0,
    "cascade_small_1x": 0.0,
}


def load(name, *overrides):
    return load_detection_config(
        f"iwin/{name}", [*([] if "scenes" in name else ["data.path=COCO"]), *overrides]
    )


def test_scenes_are_the_default_and_the_paper_s_recipe_where_data_are_given(tmp_path):
    loaded = load_detection_config()
    assert loaded == load("detect_scenes")
    assert load_detection_config(None, ["data.path=COCO"]) == load("mask_rcnn_tiny_1x")
    (tmp_path / "saved.yaml").write_text(to_yaml(loaded))
    assert load_detection_config(tmp_path / "saved.yaml") == loaded


def test_there_is_a_recipe_of_each_detector_size_and_length():
    names = {path.stem for path in PATHS}
    of_table_2 = {
        f"{kind}_{size}_{x}"
        for kind in ("mask_rcnn", "cascade")
        for size in ("tiny", "small")
        for x in ("1x", "3x")
    }
    of_table_8 = {f"mask_rcnn_tiny_1x_{change}" for change in ("cosine", "lr2", "relative")}
    assert names == {"detect_scenes", "mask_rcnn_small_1x_relative"} | of_table_2 | of_table_8


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_builds_and_opens_with_its_command(path):
    loaded = load(path.stem)
    assert loaded.run.dir == f"runs/iwin_{path.stem}"
    opening = path.read_text().splitlines()[:4]
    assert any(" detect" in line for line in opening), "a YAML opens with its command"
    assert any("parameters" in line for line in opening), "and its cost"
    if path.stem == "detect_scenes":
        return
    kind, size = path.stem.split("_")[0], next(size for size in ("tiny", "small") if size in path.stem)
    with torch.device("meta"):
        model = make_detector(loaded.model, 80)
    tables = TABLES[size] * 13**2 if "relative" in path.stem else 0
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[kind, size] + tables
    assert isinstance(model, Detector)
    assert model.backbone.body.config.drop_path_rate == DROP_PATHS.get(path.stem, 0.2)
    assert (loaded.model.short_side, loaded.model.long_side) == (800, 1333)
    assert loaded.augmentation.short_sides == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_learning_rate_is_the_recipe_s(path):
    loaded = load(path.stem)
    if path.stem == "detect_scenes":
        return
    epochs, falls = (12, (8, 11)) if "1x" in path.stem else (36, (27, 33))
    peak = 2e-4 if "lr2" in path.stem else 1e-4
    assert loaded.training.steps == epochs * STEPS_OF_EPOCH
    assert learning_rate(500, loaded.optimizer) == pytest.approx(peak, rel=1e-4)
    last = learning_rate(loaded.training.steps, loaded.optimizer)
    if "cosine" in path.stem:
        assert last == 0
        return
    for count, epoch in enumerate(falls):
        step = epoch * STEPS_OF_EPOCH
        assert learning_rate(step, loaded.optimizer) == pytest.approx(peak * 0.1**count)
        assert learning_rate(step + 1, loaded.optimizer) == pytest.approx(peak * 0.1 ** (count + 1))
