"""Serving the page with a stand-in for gradio: where it listens, and what goes with the process."""

import os
import signal
import socket
import sys
from types import SimpleNamespace

import pytest

from flashdit.web import serve


@pytest.fixture
def launched(monkeypatch):
    """Returns what the page was launched with; ending it is what a terminated process does."""
    given = {}

    def end():
        given["folder"] = next(folder for folder in given["studio"].folder.parent.glob("flashdit-app-*"))
        os.kill(os.getpid(), signal.SIGTERM)

    page = SimpleNamespace(launch=lambda **options: given.update(options), block_thread=end)
    layout = SimpleNamespace(CSS="", THEME=None, make_page=lambda studio: given.update(studio=studio) or page)
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flashdit.web.page", layout)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    before = signal.getsignal(signal.SIGTERM)
    yield given
    signal.signal(signal.SIGTERM, before)


def test_the_page_listens_where_it_is_asked_to_and_its_folder_goes(
    launched, tiny_checkpoint, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(SystemExit) as exit_info:
        serve.serve([str(tiny_checkpoint)], "127.0.0.1", port, "cpu", None, "ema")
    assert exit_info.value.code == 0
    assert (launched["server_name"], launched["server_port"]) == ("127.0.0.1", port)
    assert launched["share"] is False
    assert capsys.readouterr().out.startswith(f"http://127.0.0.1:{port} ")
    assert [name.rpartition(", ")[2] for name in launched["studio"].generators] == ["step 7"]
    assert not launched["folder"].exists()
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
