import pytest

from iwin_tasks.classification.config import load_classifier_config
from iwin_tasks.classification.task import ClassifierTrainer


@pytest.fixture(scope="session")
def classifier_run(tmp_path_factory):
    """Returns the run of a classifier of the digits after two steps."""
    folder = tmp_path_factory.mktemp("classifier") / "run"
    overrides = [f"run.dir={folder}", "training.steps=2", "optimizer.decay_steps=null"]
    overrides += ["training.preview_every=2", "training.global_batch_size=4"]
    ClassifierTrainer(load_classifier_config(None, overrides)).fit()
    return folder
