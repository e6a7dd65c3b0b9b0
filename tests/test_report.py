"""The report is one safe, small, self-contained page."""

import base64
import io
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genrec.errors import ArtefactError
from genrec.report import Example, Shown, Texts, Written, write_report

VOID = {"meta", "img", "br", "link", "input", "hr"}
ATTACK = '<script>alert("x")</script>'


def value(mean, low, high):
    return {"mean": mean, "ci95": [low, high]}


def make_metrics() -> dict[str, Any]:
    def model(mean):
        names = ("recall@10", "recall@50", "ndcg@10", "mrr")
        many = {name: value(mean, mean - 0.02, mean + 0.02) for name in names}
        return many | {"coverage": {"mean": 0.5, "ci95": None}}

    models = {"oracle": model(0.9), "popularity": model(0.1), "sasrec": model(0.3), "genrec": model(0.4)}
    paired = {"genrec-sasrec": {"recall@10": value(0.1, 0.04, 0.16), "ndcg@10": value(0.1, 0.05, 0.15)}}
    group = {"users": 7, "models": {"genrec": model(0.2)}, "paired": {}}
    groups = {ATTACK: group, "nobody": {"users": 0, "models": {}, "paired": {}}}
    return {
        "data": "toy",
        "split": "temporal",
        "users": 50,
        "models": models,
        "paired": paired,
        "groups": groups,
    }


def make_page(folder, **changes):
    arguments: dict[str, Any] = {
        "title": "run <one>",
        "metrics": make_metrics(),
        "curves": {
            "finetune": [{"step": i, "loss": 5 / (i + 1)} for i in range(5000)] + [{"step": 9, "ndcg@10": 0.2}],
            "align": [{"step": 1, "loss": float("nan")}],
        },
        "sid_report": {
            "items": 9,
            "collided_share": 0.123456,
            "levels": [{"codes_used": 31, "entropy_bits": 4.5}, {"codes_used": 8, "entropy_bits": 2.25}],
        },
        "examples": [],
        "settings": {"name": "one", "data": {"synthetic": {"n_items": 9}, "items": None}},
    }
    path = folder / "report.html"
    write_report(path, **(arguments | changes))
    return path.read_text(encoding="utf-8")


class Tree(HTMLParser):
    """Collects tags and text, and insists that every tag is closed in order."""

    def __init__(self, page):
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] != "style":
            self.texts.append(data.strip())


def test_page_is_well_formed_self_contained_and_escaped(tmp_path):
    item = Shown(item_id='a"b', title=ATTACK, image=None, hit=True)
    examples = [Example(user_id=ATTACK, group=ATTACK, history=[item], recommended=[item], taken=[item])]
    page = make_page(tmp_path, title=ATTACK, examples=examples, settings={ATTACK: ATTACK})
    tree = Tree(page)
    assert "script" not in {tag for tag, _ in tree.tags}
    assert tree.texts.count(ATTACK) >= 5
    for _, attributes in tree.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert not str(attributes.get("src", "data:")).startswith("http")
        assert str(attributes.get("href", "#")).startswith("#")
    assert "@import" not in page
    assert "hit" in tree.texts


def test_numbers_and_marks_are_there(tmp_path):
    page = make_page(tmp_path)
    texts = Tree(page).texts
    for text in (
        "0.400",
        "0.380 to 0.420",
        "+0.100",
        "+0.040 to +0.160",
        "toy · split temporal · 50 test users",
    ):
        assert text in texts
    best = re.findall(r'<tr class="best">\s*<th scope="row">(\S+)', page)
    assert best == ["genrec", "genrec"]  # the whole table and one group; never the oracle
    for text in (
        "codes_used",
        "31",
        "4.5",
        "collided_share",
        "0.1235",
        "data.synthetic.n_items",
        "data.items",
    ):
        assert text in texts
    assert "0 users" not in page


def test_figures_are_labelled_small_and_follow_the_page_colours(tmp_path):
    tree = Tree(make_page(tmp_path))
    figures = [attributes["aria-label"] for tag, attributes in tree.tags if tag == "svg"]
    assert figures == [
        "Paired differences with 95 % intervals: genrec-sasrec",
        "Learning curves: finetune: loss, finetune: ndcg@10",
    ]
    identifiers = [attributes["id"] for _, attributes in tree.tags if "id" in attributes]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "#010203" not in page
    assert "currentColor" in page
    assert len(page) < 150_000
    for reference in re.findall(r"url\(#([^)]+)\)", page):
        assert identifiers.count(reference) == 1


def test_an_empty_run_still_makes_a_page(tmp_path):
    metrics = make_metrics() | {"paired": {}}
    del metrics["groups"]
    texts = Tree(make_page(tmp_path, metrics=metrics, curves={}, sid_report={}, settings={})).texts
    assert "No curve was recorded." in texts
    assert "No users to show." in texts


def test_pictures_are_small_data_uris_with_alternatives(tmp_path):
    Image.new("RGBA", (400, 200), (250, 10, 10, 255)).save(tmp_path / "red.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    red = Shown("r", "Red", str(tmp_path / "red.png"))
    others = [
        Shown("b", "Broken", str(tmp_path / "broken.png")),
        Shown("g", "Gone", str(tmp_path / "gone.png")),
    ]
    page = make_page(tmp_path, examples=[Example("u", history=[red, *others], taken=[red])])
    tree = Tree(page)
    pictures = [attributes for tag, attributes in tree.tags if tag == "img"]
    assert [p["alt"] for p in pictures] == ["Picture of Red"] * 2
    image = Image.open(io.BytesIO(base64.b64decode(pictures[0]["src"].split(",")[1])))
    assert image.size == (96, 48)
    assert np.abs(np.array(image)[24, 48].astype(int) - [250, 10, 10]).max() < 8
    labels = [attributes.get("aria-label") for _, attributes in tree.tags]
    assert {"No picture of Broken", "No picture of Gone"} <= set(labels)


def test_noisy_pictures_of_many_users_stay_under_three_megabytes(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    items = [Shown(str(i), "noise", str(tmp_path / f"{i}.png")) for i in range(40)]
    examples = [Example(f"u{u}", None, items, items, items) for u in range(30)]
    page = make_page(tmp_path, examples=examples)
    assert 1_000_000 < len(page.encode()) < 3_000_000
    tree = Tree(page)
    assert sum(tag == "article" for tag, _ in tree.tags) == 12
    assert sum(tag == "li" for tag, _ in tree.tags) == 12 * 30


def test_texts_stand_beside_their_pictures_as_they_came_out(tmp_path):
    Image.new("RGB", (9, 9), (250, 10, 10)).save(tmp_path / "red.png")
    about, had = Shown("a", "Red lamp", str(tmp_path / "red.png")), [Shown("b", "Blue mug")]
    examples = [Written(about, f"user {i}", had, "long plain", f"{ATTACK} {i}", f"Right {i}") for i in range(12)]
    metrics = {"faithful": value(0.5, 0.4, 0.6), "distinct-1": {"mean": 0.25, "ci95": None}}
    page = make_page(tmp_path, texts=[Texts("describe", metrics, examples)])
    tree = Tree(page)
    labels = [attributes.get("aria-label") for tag, attributes in tree.tags if tag == "article"]
    assert labels == [f"describe for user {i}" for i in range(10)]
    assert [text for text in tree.texts if text.startswith(ATTACK)] == [f"{ATTACK} {i}" for i in range(10)]
    assert {"Right 0", "long plain", "faithful", "0.500", "0.400 to 0.600", "0.250", "Blue mug"} <= set(tree.texts)
    pictures = [attributes for tag, attributes in tree.tags if tag == "img"]
    assert [picture["alt"] for picture in pictures] == ["Picture of Red lamp"] * 10
    assert all(picture["src"].startswith("data:image/jpeg;base64,") for picture in pictures)
    assert "#texts" in {attributes.get("href") for _, attributes in tree.tags}
    assert 'id="texts"' not in make_page(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(ArtefactError, match=r"report\.html: cannot be written"):
        make_page(tmp_path)
