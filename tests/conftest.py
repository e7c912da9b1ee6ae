import resource
import signal
import sys
from contextlib import contextmanager

import pytest
import torch

for name, usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if signal.getsignal(getattr(signal, name)) is signal.SIG_IGN:  # by nohup or a shell's background job
        signal.signal(getattr(signal, name), usual)  # processes that tests start inherit what is ignored


@pytest.fixture
def tiny_shards(tmp_path):
    """Returns a folder of two shards, 3 × 8 × 8 latents of 20 + 17 images in 3 classes, and statistics."""
    from flashdit.data.shards import write_shard, write_statistics

    folder = tmp_path / "shards"
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(3, 3, 1, 8, generator=generator).expand(-1, -1, 8, -1)
    for number, rows in enumerate((20, 17)):
        labels = torch.arange(rows) % 3
        latents = 2 + 3 * patterns[labels] + 0.1 * torch.randn(rows, 3, 8, 8, generator=generator)
        write_shard(folder, 0, number, latents, latents.flip(-1), labels)
    write_statistics(folder, torch.full((1, 3, 1, 1), 2.0), torch.full((1, 3, 1, 1), 3.0))
    return folder


@pytest.fixture
def tiny_overrides(tiny_shards, tmp_path):
    """Returns the command-line overrides of a tiny run on the tiny shards."""
    return [
        f"run.dir={tmp_path / 'run'}",
        "data.name=shards",
        f"data.path={tiny_shards}",
        "latents.vae=null",
        "model.sample_size=8",
        "model.in_channels=3",
        "model.num_classes=3",
        "model.hidden_size=16",
        "model.depth=1",
        "training.steps=6",
        "training.global_batch_size=8",
        "training.save_every=2",
        "training.log_every=1",
    ]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Forgets Accelerate's shared state, which would leak one test's precision into the next."""
    yield
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def features_in_a_temporary_folder(tmp_path_factory, monkeypatch):
    """Keeps the tests' features out of the user's cache."""
    monkeypatch.setenv("FLASHDIT_CACHE", str(tmp_path_factory.mktemp("features")))


@pytest.fixture
def exit_message(capsys):
    """Returns a function that runs a script's main and gives its one line on stderr, at exit status 2."""
    from flashdit.shared.command import run_script

    def run(script, *argv):
        with pytest.raises(SystemExit) as exit_info:
            run_script(lambda: script.main([str(argument) for argument in argv]))
        printed = capsys.readouterr().err
        assert exit_info.value.code == 2
        assert printed.count("\n") == 1, printed
        return printed

    return run


@pytest.fixture
def no_room():
    """Returns a function that gives a block in which no file grows beyond 2,000 bytes, as on a full disk."""

    @contextmanager
    def limited():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited
