"""The served page by HTTP: what it answers, what it refuses, and what is on the disk afterwards."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PATIENCE_S = 60
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="needs gradio, of the extra 'app'"
)
GOOD = {"model": None, "beside": "nothing", "classes": ["cat"], "num_images": 2, "cfg_scale": 1.0}
GOOD |= {"cfg_low": 0, "cfg_high": 1, "sampler": "euler", "steps": 2, "height": 32, "width": 32, "seed": 0}
GOOD |= {"across": "nothing", "across_values": "", "down": "nothing", "down_values": ""}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return str(probe.getsockname()[1])


class Page:
    """A page in a process of its own, whose temporary files are in a folder of its own."""

    def __init__(self, checkpoint, folder, *options):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("GRADIO_")}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
        command = [sys.executable, "-m", "flashdit", "app", "--checkpoint", str(checkpoint), *options]
        self.folder = folder
        self.process = subprocess.Popen(
            [*command, "--device", "cpu"], env=environment, stdout=subprocess.PIPE, text=True
        )
        self.address = self.process.stdout.readline().split()[0]

    def open(self, path, data=None, **headers):
        """Returns the status and the bytes of an answer."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.address + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def generate(self, **changes):
        """Returns the last event of a request to the API: its name and what it says."""
        values = GOOD | {"model": f"{self.name}, step 7"} | changes
        body = json.dumps({"data": list(values.values())}).encode()
        status, said = self.open("/gradio_api/call/generate", body, Content_Type="application/json")
        assert status == 200, said
        _, events = self.open(f"/gradio_api/call/generate/{json.loads(said)['event_id']}")
        name, data = events.decode().strip().split("\n\n")[-1].split("\n")
        return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))

    def inputs(self):
        """Returns how many inputs each function of the page takes."""
        return [len(made["inputs"]) for made in json.loads(self.open("/config")[1])["dependencies"]]

    def files(self):
        return {path for path in self.folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def page(tiny_checkpoint, tmp_path_factory):
    """Returns a page that another name leads to and that allows 2 million pixel evaluations a request."""
    folder = tmp_path_factory.mktemp("tmp")
    port = free_port()
    page = Page(tiny_checkpoint, folder, "--port", port, "--allow-host", "page.example", "--max-work", "2")
    page.name = tiny_checkpoint.parent.parent.name
    with page.process:
        yield page
        page.process.send_signal(signal.SIGTERM)
        assert page.process.wait(PATIENCE_S) == 0
    assert list(folder.iterdir()) == [], "the folder goes with the process"


def test_an_upload_is_refused_and_nothing_is_on_the_disk(page):
    before = page.files()
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n' + b"a" * 2**20
    kind = "multipart/form-data; boundary=x"
    for path in ("/gradio_api/upload", "/upload", "/gradio_api/upload/"):
        try:
            status, _ = page.open(path, body + b"\r\n--x--\r\n", Content_Type=kind)
        except (urllib.error.URLError, ConnectionError):  # closed before all was sent
            status = 403
        assert status == 403
    assert page.files() == before


@pytest.mark.parametrize(
    "path", ["/", "/config", "/gradio_api/info", "/gradio_api/queue/data?session_hash=a"]
)
def test_a_foreign_page_reads_nothing(page, path):
    assert page.open(path, Origin="http://evil.example")[0] == 403
    assert page.open(path, Host="spoof", Origin="http://spoof")[0] == 403
    assert page.open(path, Origin="null")[0] == 403
    if "queue" not in path:  # which would be waited for
        assert page.open(path, Host="page.example", Origin="https://page.example")[0] == 200


def test_only_pictures_of_this_process_are_served(page, tmp_path):
    (tmp_path / "mine.png").write_bytes(b"secret")
    event, shown = page.generate()
    assert event == "complete", shown
    picture = shown[2]["value"][0]["image"]["path"]
    assert page.open(f"/gradio_api/file={picture}")[1].startswith(b"\x89PNG")
    assert Path(picture).is_relative_to(page.folder)
    for wanted in (
        tmp_path / "mine.png",
        f"{picture}/../../../../../../etc/passwd",
        "/etc/passwd",
        ROOT / "README.md",
    ):
        assert page.open(f"/gradio_api/file={wanted}")[0] == 403


def test_pictures_are_not_copied(page):
    before = len([path for path in page.files() if path.suffix == ".png"])
    page.generate(num_images=3)
    assert len([path for path in page.files() if path.suffix == ".png"]) - before == 3 + 2 + 2  # film, grids


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"steps": "ten"}, "steps must be a whole number or null, got 'ten'"),
        ({"steps": 2.5}, "steps must be a whole number or null, got 2.5"),
        ({"steps": True}, "steps must be a whole number or null, got True"),
        ({"num_images": None}, "num_images must be a whole number, got None"),
        ({"num_images": [2]}, "num_images must be a whole number, got [2]"),
        ({"cfg_scale": float("nan")}, "cfg_scale must be a number within ±9,007,199,254,740,992, got NaN"),
        ({"cfg_scale": float("inf")}, "cfg_scale must be a number within ±"),
        ({"seed": 10**400}, "seed must be a number within ±9,007,199,254,740,992, got a larger one"),
        ({"cfg_low": {"a": 1}}, "cfg_low must be a number or null, got {'a': 1}"),
        ({"cfg_low": float("nan")}, "cfg_low must be a number within ±"),
        ({"classes": "cat"}, "classes must be a list, each text or a whole number or null, got 'cat'"),
        (
            {"classes": [["cat"]]},
            "classes must be a list, each text or a whole number or null, got [['cat']]",
        ),
        ({"classes": ["cat"] * 5000}, "classes must have at most 200 entries, got 5,000"),
        ({"classes": ["c" * 100_000]}, "classes must have at most 200 characters, got 100,000"),
        ({"classes": ["<b>"]}, "unknown class '&lt;b&gt;'"),
        ({"sampler": 3}, "sampler must be text or null, got 3"),
        ({"model": ["a"]}, "unknown model '['a']'"),
        ({"beside": {"path": "/etc/passwd"}}, "unknown model '{'path': '/etc/passwd'}'"),
        ({"across": "guidance", "across_values": 3}, "across_values must be text or null, got 3"),
        ({"steps": 1000, "num_images": 64}, "images × pixels × model evaluations must be at most 2 million"),
    ],
)
def test_a_wrong_value_is_one_sentence(page, wrong, sentence):
    event, said = page.generate(**wrong)
    assert event == "error"
    assert said["error"].startswith(sentence)
    assert "\n" not in said["error"]
    assert "Traceback" not in str(said)


@pytest.mark.parametrize("data", [[], ["a", "b", "c"], [None] * 15])
def test_too_few_inputs_are_one_sentence(page, data):
    numbers = [number for number, wanted in enumerate(page.inputs()) if wanted == 16]
    body = json.dumps({"data": data, "fn_index": numbers[0], "session_hash": "x"}).encode()
    for path in ("call/generate", "call/generate/", "queue/join"):
        status, said = page.open(f"/gradio_api/{path}", body, Content_Type="application/json")
        assert (status, said.decode()) == (400, f"data must have 16 inputs, got {len(data)}\n")


def test_a_request_whose_body_is_no_request_leaves_the_page_alive(page):
    for body in (b"", b"{", b"[]", b'{"data": 3}', b'{"data": [1' + b"0" * 5000 + b"]}", b"\xff"):
        status, said = page.open("/gradio_api/call/generate", body, Content_Type="application/json")
        assert 400 <= status < 500
        assert b"Traceback" not in said
    assert page.generate()[0] == "complete"
