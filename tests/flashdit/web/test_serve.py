"""Serving the page: where it listens, and what goes with the process, however it ends."""

import logging
import os
import signal
import socket
from types import SimpleNamespace

import pytest

from flashdit.web import serve


@pytest.fixture(autouse=True)
def own_signals(monkeypatch, tmp_path):
    """Keeps the temporary folders here, and puts the signals and the environment back."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    before = {name: signal.getsignal(getattr(signal, name)) for name in serve.ENDING}
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.mark.parametrize("name", serve.ENDING)
def test_the_folder_goes_with_the_process_whatever_ends_it(tiny_checkpoint, monkeypatch, tmp_path, name):
    seen = []

    def launch(studio, listener, host, allowed):
        seen.extend((studio, studio.folder.exists(), listener.getsockname(), host, allowed))
        os.kill(os.getpid(), getattr(signal, name))

    monkeypatch.setattr(serve, "launch", launch)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(SystemExit) as exit_info:
        serve.serve([str(tiny_checkpoint)], "127.0.0.1", port, "cpu", None, "ema", ["a.example"], 7.0)
    assert exit_info.value.code == 0
    studio, *rest = seen
    assert rest == [True, ("127.0.0.1", port), "127.0.0.1", ["a.example"]]
    assert [name.rpartition(", ")[2] for name in studio.generators] == ["step 7"]
    assert studio.max_work == 7
    assert studio.is_closed
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_was_ignored_stays_ignored(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(serve, "launch", lambda *_: os.kill(os.getpid(), signal.SIGHUP))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    serve.serve([str(tiny_checkpoint)], "127.0.0.1", port, "cpu", None, "ema", [], 7.0)


def test_what_a_killed_page_left_is_removed_and_what_another_one_holds_is_not(tmp_path):
    killed, foreign = tmp_path / "flashdit-app-killed", tmp_path / "flashdit-app-mine"
    for folder in (killed, foreign):
        (folder / "made").mkdir(parents=True)
    (killed / serve.OWNER).touch()
    with serve.own_folder() as first, serve.own_folder() as second:
        assert first != second
        assert first.exists()
        assert second.exists()
    assert list(tmp_path.iterdir()) == [foreign]


def test_a_port_is_held_while_the_models_are_loaded(tiny_checkpoint, monkeypatch):
    def load(*_):
        with pytest.raises(ValueError, match="must be free to listen on"):
            serve.listen("127.0.0.1", port)
        raise ValueError("loaded")

    monkeypatch.setattr(serve, "load_generators", load)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(ValueError, match="loaded"):
        serve.serve([str(tiny_checkpoint)], "127.0.0.1", port, "cpu", None, "ema", [], 7.0)


def test_requests_that_are_cut_off_at_the_end_are_no_faults(caplog):
    server, errors = SimpleNamespace(should_exit=False), logging.getLogger("uvicorn.error")
    serve.quiet_at_the_end(server)
    try:
        errors.error("broken while it serves")
        server.should_exit = True
        errors.error("cut off at the end")
    finally:
        errors.removeFilter(errors.filters[-1])
    assert caplog.messages == ["broken while it serves"]
