"""The page as a browser reads it: parsed, its pictures decoded and compared with the images themselves."""

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from flashdit.digits.images import digits
from flashdit.evaluation.evaluate import Plan, evaluate_fully
from flashdit.evaluation.features.extractor import EXTRACTORS
from flashdit.evaluation.images.sources import NpzSource
from flashdit.evaluation.reference import Reference
from flashdit.evaluation.reports.by_class import ClassScore
from flashdit.evaluation.reports.gallery import GALLERY_PARTS, make_gallery
from flashdit.evaluation.reports.html import (
    MAX_CLASSES,
    flatten,
    shown_size,
    sweep_uri,
    to_html,
    worst_classes,
    write_html,
)
from flashdit.evaluation.reports.report import footnotes, table_rows

VOID = {"meta", "img", "br"}
NASTY = '<b>"&"</b>'


class Page(HTMLParser):
    """Collects images, links, tables and text; refuses tags that do not close."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.images, self.outside, self.tables = [], [], {}
        self.open, self.text, self.title = [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(attributes)
        if tag == "table":
            self.rows = self.tables[attributes["id"]] = []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.outside += [
            v
            for k, v in attributes.items()
            if k in ("href", "src") and not v.startswith("data:image/png;base64,")
        ]
        assert tag != "script"
        assert not any(name.startswith("on") for name in attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
            return
        self.text.append(data)
        if self.open and self.open[-1] == "title":
            self.title += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def pixels(attributes):
    data = base64.b64decode(attributes["src"].removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(data)) as picture:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def save(path, split, count):
    images, labels = (part[:count] for part in digits(split))
    np.savez(path, images.permute(0, 2, 3, 1).numpy(), labels.numpy())
    return path


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """100 training digits against 120 held-out ones: result and gallery; the class 'six' has a nasty name."""
    folder = tmp_path_factory.mktemp("samples")
    extractor = EXTRACTORS.build({"name": "digits"}).eval()
    plan = Plan(
        NpzSource(save(folder / 'a"<&.npz', "train", 100)),
        extractor,
        Reference(str(save(folder / "real.npz", "held-out", 120)), extractor),
        ["fid", "precision", "recall", "accuracy"],
    )
    result, samples, reference = evaluate_fully(plan, extra_parts=set(GALLERY_PARTS))
    gallery = make_gallery(plan, samples, reference)
    gallery.classes[6].name = NASTY
    result.warnings.append(f"beware of {NASTY}")
    return result, gallery


@pytest.fixture(scope="module")
def page(evaluation):
    return Page(to_html(*evaluation))


def test_page_refers_to_nothing_outside_itself_and_is_small(evaluation, page, tmp_path):
    assert page.outside == []
    write_html(tmp_path / "metrics.html", *evaluation)
    assert (tmp_path / "metrics.html").stat().st_size < 2_000_000
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.html"]


def test_every_image_is_there_in_order_and_unchanged(evaluation, page):
    _, gallery = evaluation
    pictures = [picture for section in gallery.sections for _, row in section.rows for picture in row]
    assert len(page.images) == len(pictures) >= 100 + 8 * 6
    for attributes, picture in zip(page.images, pictures, strict=True):
        assert torch.equal(pixels(attributes), gallery.image_of(picture))
        assert (attributes["width"], attributes["height"]) == ("64", "64")
        name = f"{'real image' if picture.real else 'sample'} {picture.row}"
        assert attributes["alt"] == ", ".join([name, *picture.caption])
        assert ("doubtful" in attributes["class"]) == picture.doubtful


def test_numbers_are_those_of_the_markdown(evaluation, page):
    result, _ = evaluation
    assert page.tables["numbers"] == table_rows(result)
    text = "\n".join(page.text)
    assert all(note in text for note in footnotes(result))


def test_whole_recipe_is_stated(evaluation, page):
    result, _ = evaluation
    stated = dict(page.tables["recipe"])
    assert stated["extractor.fingerprint"] == result.extractor["fingerprint"]
    assert stated["samples.path"] == result.samples["path"]
    assert stated["num_images"] == "100"
    assert stated["settings.neighbours"] == "3"
    assert "versions.torch" in stated
    assert "timings_s.samples" in stated


def test_text_is_text_whatever_is_in_it(page):
    text = "".join(page.text)
    assert f"beware of {NASTY}" in text
    assert 'a"<&.npz' in page.title
    assert NASTY in [row[0] for row in page.tables["classes"]]


def test_classes_show_their_distance_and_accuracy(evaluation, page):
    _, gallery = evaluation
    header, *rows = page.tables["classes"]
    assert header == ["class", "samples", "real", "FD[digits]", "", "accuracy", "mistaken for"]
    for row, score in zip(rows, gallery.classes, strict=True):
        assert row[:4] == [score.name, str(score.num_samples), str(score.num_real), f"{score.distance:.3f}"]
        assert row[5] == f"{score.accuracy:.3f}"


def test_of_many_classes_the_worst_are_shown(evaluation):
    result, gallery = evaluation
    many = [ClassScore(name=f"c{i}", num_samples=1200, distance=float(i % 100)) for i in range(1000)]
    shown = worst_classes(many)
    assert len(shown) == MAX_CLASSES
    assert {score.distance for score in shown} == {97.0, 98.0, 99.0}
    gallery = type(gallery)(sections=[], images={}, classes=many, class_notes=[])
    assert "The 30 worst of 1,000 classes." in to_html(result, gallery)
    page = Page(to_html(result, gallery))
    assert page.images == []
    assert page.tables["classes"][1][2] == "n/a"
    assert page.tables["classes"][1][1] == "1,200"


def test_a_gallery_without_classes_has_no_class_table(evaluation):
    result, gallery = evaluation
    page = Page(to_html(result, type(gallery)(sections=[], images={}, classes=[], class_notes=["no labels"])))
    assert "classes" not in page.tables
    assert "no labels" in page.text


def test_sweep_of_the_same_weights_is_shown_and_another_is_not(evaluation, tmp_path, caplog):
    result, gallery = evaluation
    Image.new("RGB", (12, 8), "red").save(tmp_path / "sweep.png")
    content = {"recipe": {"samples": {"weights_sha256": "ab"}}}
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    assert sweep_uri(tmp_path, result) is None
    result.samples["weights_sha256"] = "ab"
    uri = sweep_uri(tmp_path, result)
    del result.samples["weights_sha256"]
    page = Page(to_html(result, gallery, uri))
    assert page.images[-1]["class"] == "plot"
    assert pixels(page.images[-1]).shape == (3, 8, 12)
    assert sweep_uri(tmp_path / "absent", result) is None
    for text in ("{", "[]", "{}", '{"recipe": {"samples": 3}}'):
        (tmp_path / "sweep.json").write_text(text)
        assert sweep_uri(tmp_path, result) is None
        assert "sweep.json is no sweep's JSON, so the page does without it" in caplog.text
        caplog.clear()


def test_small_images_are_shown_in_whole_multiples_and_large_ones_reduced():
    assert shown_size(32, 32) == (64, 64)
    assert shown_size(28, 20) == (60, 84)
    assert shown_size(100, 90) == (90, 100)
    assert shown_size(512, 256) == (64, 128)


def test_large_images_are_sent_reduced_and_the_page_says_so(evaluation):
    result, gallery = evaluation
    images = {place: torch.zeros(3, 256, 192, dtype=torch.uint8) for place in gallery.images}
    large = type(gallery)(sections=gallery.sections, images=images, classes=[], class_notes=[])
    text = to_html(result, large)
    assert "Images are shown reduced to 128 pixels." in text
    assert pixels(Page(text).images[0]).shape == (3, 128, 96)
    assert "reduced" not in to_html(result, gallery)


def test_nested_recipe_is_flattened_by_dots():
    content = {"a": {"b": 1, "c": {"d": [1, 2]}}, "e": "x", "f": None}
    assert list(flatten(content)) == [("a.b", "1"), ("a.c.d", "[1, 2]"), ("e", "x"), ("f", "null")]
