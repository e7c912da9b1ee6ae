import pytest

from iwin_tasks.scenes import SceneOptions
from iwin_tasks.scenes.folders import write_ade20k

SCENES = SceneOptions(image_size=(40, 56), digits=(1, 4), train_images=4, held_out_images=3)


@pytest.fixture
def folder(tmp_path):
    """Returns scenes of 40 × 56 as ADE20K's folders: 4 to train on and 3 held out, values 1 to 11."""
    for split in ("train", "held-out"):
        write_ade20k(tmp_path / "data", SCENES, split)
    return tmp_path / "data"
