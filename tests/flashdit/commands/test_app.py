"""The web page in headless Chromium, clicked through as a user does, and what its command refuses."""

import base64
import importlib.util
import io
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from flashdit.commands import app, sample, train
from flashdit.sampling.checkpoint import load_generator
from flashdit.sampling.recipe import identity
from flashdit.shared.files import read_checked_json
from flashdit.web import serve
from flashdit.web.studio import FRAMES, Studio, load_generators

ROOT = Path(__file__).parents[3]
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
MISSING += [name for name, path in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if path is None]
needs_browser = pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)}")
NANO = [
    *("training.steps=4", "training.save_every=2", "training.preview_every=4", "training.log_every=4"),
    *("model.hidden_size=16", "model.depth=1", "sampling.steps=3", "sampling.cfg_scale=1.5"),
]
PATIENCE_S = 60
HTML = "<img src=x onerror=document.title='run'>"
SCREENSHOTS = os.environ.get("FLASHDIT_SCREENSHOTS")  # a folder, for the pictures of docs/
SHOWN_RUN = os.environ.get("FLASHDIT_SHOWN_RUN")  # a run to take them of, in place of the nano model
DESKTOP, PHONE = (1280, 900), (390, 844)
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight"]
TOAST = "[data-testid=toast-body]"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Returns a folder with runs/nano: a nano model on the embedded digits, at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("home")
    train.main([f"run.dir={folder / 'runs' / 'nano'}", *NANO])
    for state in folder.glob("runs/nano/checkpoints/*/state.json"):
        about = read_checked_json(state)
        about["class_names"][9] = HTML
        state.write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def served(home):
    """Returns the process and the address of the page of the run's two checkpoints."""
    port = free_port()
    first, last = sorted((home / "runs" / "nano" / "checkpoints").iterdir())
    last = SHOWN_RUN or last
    command = [
        sys.executable,
        "-m",
        "flashdit",
        "app",
        "--checkpoint",
        last,
        first,
        "--port",
        str(port),
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GRADIO_")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(home)}
    process = subprocess.Popen(
        [*map(str, command), "--device", "cpu"], cwd=home, env=environment, stdout=subprocess.PIPE, text=True
    )
    with process:
        said = process.stdout.readline()
        assert said.startswith(f"http://127.0.0.1:{port} ")
        yield process, said.split()[0]
        process.terminate()
        process.wait(PATIENCE_S)
    assert list(home.glob("flashdit-app-*")) == [], "the pictures' folder goes with the process"


@pytest.fixture(scope="module")
def browser():
    """Returns a headless Chromium."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for word in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "disable-gpu",
        "window-size=1400,1200",
    ):
        options.add_argument(f"--{word}")
    driver = Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(served, browser):
    """Returns the browser on a fresh page."""
    browser.get(served[1])
    wait(browser, lambda: find(browser, "#generate"))
    return browser


def wait(page, condition):
    """Returns the condition's first true value."""
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    waiting = WebDriverWait(page, PATIENCE_S, 0.1, [StaleElementReferenceException])
    return waiting.until(lambda _page: condition())


def find(page, selector):
    return page.find_elements("css selector", selector)


def write(page, name, text):
    """Types a value into a control in place of what it holds, and leaves it, which closes its list."""
    keys = ("\ue009a\ue000", text, "\ue007\ue004")  # control + a, the text, enter, tab
    send(page, f"#{name} input:not([type=range])", *keys)


def send(page, selector, *keys):
    """Types keys into a control, which the page may draw anew meanwhile."""
    wait(page, lambda: [field.send_keys(*keys) for field in find(page, selector)])


def choose(page, name, text):
    """Chooses an entry of a list; the page may draw its controls anew meanwhile."""

    def click(selector, ending=""):
        found = [element for element in find(page, selector) if element.text.endswith(ending)]
        for element in found[:1]:
            element.click()
        return found

    wait(page, lambda: click(f"#{name} input"))
    wait(page, lambda: click("[role=option]", text))


def set_size(page, width, height):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 640}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def screenshot(page, name, folder):
    """Writes a picture of the whole page."""
    answer = page.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    (Path(SCREENSHOTS or folder) / f"{name}.png").write_bytes(base64.b64decode(answer["data"]))


def press(page):
    find(page, "#generate")[0].click()


def pictures(page, num_images=10, num_frames=3, side=0):
    """Returns the addresses of the images and of the film of a side, once so many of each are drawn."""

    def drawn():
        images, film = (find(page, f"#{part}-{side} img") for part in ("images", "film"))
        sizes = [page.execute_script("return arguments[0].naturalWidth", image) for image in (*images, *film)]
        if (len(images), len(film)) != (num_images, num_frames) or not all(sizes):
            return None
        return [[image.get_attribute("src") for image in part] for part in (images, film)]

    return wait(page, drawn)


def fetch(url):
    with urllib.request.urlopen(url) as answer:
        return answer.read()


def pixels(data):
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as picture:
        return np.asarray(picture.convert("RGB"))


def recipe_of(data):
    with Image.open(io.BytesIO(data)) as picture:
        return json.loads(picture.text["recipe"])


def whole_pictures(folder):
    """Returns the downloaded pictures that are complete: the browser makes a file before it fills it."""
    return [data for path in folder.glob("flashdit*.png") if b"IEND" in (data := path.read_bytes())[-12:]]


@needs_browser
def test_a_click_shows_the_images_of_sample_py_and_gives_them_with_their_recipe(page, home, tmp_path):
    write(page, "classes", "Seven")
    for name, value in (("seed", 3), ("steps", 4), ("num_images", 2), ("width", 40), ("cfg_high", 0.5)):
        write(page, name, str(value))
    press(page)
    images, film = pictures(page, 2, 4)
    options = ["--class", "seven", "--num-images", "2", "--seed", "3", "--steps", "4", "--width", "40"]
    options += ["--height", "32", "--cfg-interval", "0.22", "0.5", "--format", "png"]
    out = tmp_path / "out"
    sample.main(["--checkpoint", str(home / "runs" / "nano"), "--output", str(out), *options])
    expected = sorted(out.glob("0*.png"))
    assert len(expected) == 2
    for url, path in zip(images, expected, strict=True):
        assert np.array_equal(pixels(fetch(url)), pixels(path))
    assert [caption.text for caption in find(page, "#images-0 .caption-label")] == ["seven", "seven"]
    assert [caption.text for caption in find(page, "#film-0 .caption-label")] == [
        "0.00",
        "0.25",
        "0.50",
        "0.75",
    ]
    page.execute_cdp_cmd("Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    find(page, "#download-0")[0].click()
    grid = wait(page, lambda: whole_pictures(tmp_path))[0]
    assert np.array_equal(pixels(grid), pixels(out / "grid.png"))
    theirs = json.loads((out / "recipe.json").read_text())
    for data in (grid, *map(fetch, (*images, *film))):
        assert identity(recipe_of(data)) == identity(theirs)


@needs_browser
def test_two_checkpoints_stand_side_by_side(page, home):
    assert not find(page, "#side-1")
    find(page, "#beside input")[0].click()
    (choice,) = [entry for entry in wait(page, lambda: find(page, "[role=option]")) if "step 2" in entry.text]
    choice.click()
    press(page)
    (left, _), (right, _) = pictures(page), pictures(page, side=1)
    assert len(left) == len(right) == 10
    recipes = [recipe_of(fetch(urls[0])) for urls in (left, right)]
    assert [recipe["step"] for recipe in recipes] == [4, 2]
    assert recipes[0]["sampling"] == recipes[1]["sampling"]
    run = home / "runs" / "nano"
    assert recipes[0]["weights_sha256"] == load_generator(run).recipe()["weights_sha256"]
    assert not np.array_equal(pixels(fetch(left[3])), pixels(fetch(right[3])))


@needs_browser
def test_what_cannot_be_drawn_is_one_sentence_and_what_was_there_stays(page):
    press(page)
    before, _ = pictures(page)
    for name, value, sentence in (
        ("steps", "0", "steps must be at least 1, got 0"),
        ("classes", "sevn", "unknown class 'sevn'; did you mean 'seven'?"),
    ):
        kept = find(page, f"#{name} input")[0].get_attribute("value")
        write(page, name, value)
        press(page)
        wait(page, lambda said=sentence: any(said in toast.text for toast in find(page, TOAST)))
        write(page, name, kept)
    assert [image.get_attribute("src") for image in find(page, "#images-0 img")] == before


@needs_browser
def test_an_example_sets_the_class_and_a_click_on_a_picture_gives_its_command(page, tmp_path):
    examples = wait(page, lambda: find(page, "#examples button"))
    assert [button.text for button in examples][:9] == NUMBERS
    examples[7].click()
    wait(page, lambda: find(page, "#classes")[0].text.count("seven"))
    write(page, "num_images", "3")
    write(page, "seed", "6")
    press(page)
    images, _ = pictures(page, 3)
    find(page, "#images-0 .thumbnail-item")[1].click()
    shown = wait(
        page, lambda: (text := find(page, "#command-0 .cm-content")[0].text).count("000001") and text
    )
    command, _, name = shown.replace("\n", " ").partition(" # this picture: ")
    words = shlex.split(command)
    assert words[words.index("--class") + 1 :][:5] == ["seven", "--num-images", "3", "--sampler", "euler"]
    sample.main([*words[2:], "--output", str(tmp_path / "out"), "--device", "cpu"])
    assert np.array_equal(pixels(tmp_path / "out" / name.strip()), pixels(fetch(images[1])))


@needs_browser
def test_a_grid_over_two_options_stands_in_rows_and_columns(page, tmp_path):
    set_size(page, *DESKTOP)
    wait(page, lambda: find(page, "#grid button"))[0].click()
    wait(page, lambda: find(page, "#down_values input, #down_values textarea"))
    for name, axis, values in (("across", "guidance", "1, 2, 4"), ("down", "class", "three, 8")):
        choose(page, name, axis)
        send(page, f"#{name}_values input, #{name}_values textarea", values, "\ue004")
    press(page)
    pictures(page, 6, FRAMES if SHOWN_RUN else 3)
    captions = [caption.text for caption in find(page, "#images-0 .caption-label")]
    assert captions == [f"{name}, guidance {scale}" for name in ("three", "8") for scale in (1, 2, 4)]
    tops = [image.location["y"] for image in find(page, "#images-0 img")]
    assert len(set(tops[:3])) == len(set(tops[3:])) == 1
    assert tops[0] < tops[3]
    screenshot(page, "app_grid", tmp_path)


@needs_browser
def test_the_page_shows_how_far_the_sampling_is(page):
    for name, value in (("num_images", "32"), ("steps", "300"), ("cfg_scale", "1")):
        write(page, name, value)
    press(page)
    wait(page, lambda: "0 of 32 images, t = 0." in find(page, "body")[0].text)
    pictures(page, 32, FRAMES)


@needs_browser
def test_names_that_hold_html_are_text(page):
    choose(page, "classes", HTML)
    write(page, "num_images", "1")
    write(page, "classes", "<b>sevn</b>")
    press(page)
    wait(page, lambda: any("unknown class '<b>sevn</b>'" in toast.text for toast in find(page, TOAST)))
    assert not find(page, f"{TOAST} b")
    page.refresh()
    wait(page, lambda: find(page, "#generate"))
    press(page)
    pictures(page)
    assert find(page, "#images-0 .caption-label")[9].text == HTML
    find(page, "#images-0 .thumbnail-item")[9].click()
    wait(page, lambda: "000009" in find(page, "#command-0 .cm-content")[0].text)
    assert page.title == "FlashDiT"
    assert not find(page, "img[src=x]")


@needs_browser
@pytest.mark.parametrize(("name", "size"), [("app", DESKTOP), ("app_phone", PHONE)])
def test_the_page_fits_a_desk_and_a_phone(page, tmp_path, name, size):
    set_size(page, *size)
    page.refresh()
    wait(page, lambda: find(page, "#generate"))
    press(page)
    pictures(page, 10, FRAMES if SHOWN_RUN else 3)
    screenshot(page, name, tmp_path)
    find(page, "#images-0 .thumbnail-item")[1].click()
    wait(page, lambda: "000001" in find(page, "#command-0 .cm-content")[0].text)
    width = page.execute_script("return document.documentElement.scrollWidth")
    assert width <= size[0]
    for part in ("#generate", "#steps", "#images-0", "#command-0", "#film-0", "#download-0"):
        box = find(page, part)[0].rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= size[0]
    assert find(page, "#images-0 .preview img")[0].rect["height"] > 100
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_browser
def test_another_seed_is_another_seed(page):
    seed = find(page, "#seed input")[0]
    assert seed.get_attribute("value") == "0"
    (button,) = [button for button in find(page, "#seed button") if button.text == "Another seed"]
    button.click()
    wait(page, lambda: seed.get_attribute("value") != "0")
    assert 0 <= int(seed.get_attribute("value")) < 2**31


@needs_browser
def test_the_page_asks_nobody_else_and_listens_to_this_machine_alone(page, served):
    process, address = served
    press(page)
    pictures(page)
    asked = page.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert asked
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    sockets = psutil.Process(process.pid).net_connections("inet")
    ends = {end.laddr.ip for end in sockets if end.status == psutil.CONN_LISTEN}
    assert ends == {"127.0.0.1"}


def test_a_port_that_is_taken_is_named_before_anything_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"must be free to listen on, got 127.0.0.1 {port}: .*in use"):
            app.main(["--port", str(port), "--checkpoint", "missing"])


def test_the_newest_run_is_the_default(home, monkeypatch):
    monkeypatch.chdir(home)
    arguments = app.parse([])
    assert (arguments.host, arguments.port) == ("127.0.0.1", 7860)
    assert list(load_generators(arguments.checkpoint, "cpu", None, "ema")) == ["nano, step 4"]


def test_without_a_run_the_command_says_to_train_one_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"no run with a checkpoint in runs: train one first \(flashdit train"
    ):
        app.main(["--port", str(free_port())])


def test_without_gradio_the_command_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "flashdit.web.page", raising=False)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"this requires the extra 'app': pip install 'flashdit\[app\]'"):
        serve.launch(Studio({}, tmp_path, vae=None, max_work=1), None, "127.0.0.1", [])


def test_a_port_that_cannot_be_is_named():
    with pytest.raises(ValueError, match="--port must be from 1 to 65535, got 0"):
        app.parse(["--port", "0"])


@pytest.mark.parametrize("work", ["0", "-1", "nan"])
def test_a_bound_that_allows_nothing_is_refused(work):
    with pytest.raises(ValueError, match=f"--max-work must be positive, got {float(work)}"):
        app.parse(["--max-work", work])


def test_other_names_of_the_page_are_given_to_it():
    assert app.parse(["--allow-host", "a.example", "b"]).allow_host == ["a.example", "b"]
