"""Reading the catalogue and histories over real HTTP: items, pictures, categories, users; whose key may what."""

import dataclasses
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from genrec.serving import thumbnails
from genrec.serving.api_keys import Keys, add_key
from genrec.serving.export import Export
from genrec.serving.gateway import create_app
from genrec.serving.torch_engine import TorchEngine
from genrec.serving.user_store import UserStore
from tests.gateway_fixture import http, running

SECRET = "where the photographer lives"
SLASHED = "lamps/red?1"  # an id that a path must carry


def with_pictures(export: Export, folder: Path) -> Export:
    """Item 1: a large PNG with words in it; 2: a small one; 3: no picture; 4: no file; 5: a very large one."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", SECRET)
    Image.new("RGB", (1000, 500), "red").save(folder / "1.png", pnginfo=info)
    Image.new("RGB", (64, 48), "blue").save(folder / "2.png")
    (folder / "3.png").write_text("root:x:0:0")
    Image.new("1", (3000, 3000)).save(folder / "5.png")
    images = [str(folder / f"{row}.png") if 1 <= row <= 5 else None for row in range(len(export.catalogue))]
    item_ids = [SLASHED if row == 2 else item_id for row, item_id in enumerate(export.catalogue.item_ids)]
    return dataclasses.replace(
        export, catalogue=dataclasses.replace(export.catalogue, images=images, item_ids=item_ids)
    )


@pytest.fixture(scope="module")
def export(torch_engine: TorchEngine, tmp_path_factory) -> Export:
    return with_pictures(torch_engine.export, tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> dict[str, str]:
    file = tmp_path_factory.mktemp("k") / "keys.json"
    found = {scope: add_key(file, "shop", [scope], {}) for scope in ("recommend", "read", "write", "admin", "metrics")}
    return {**found, "news": add_key(file, "news", ["read"], {}), "file": str(file)}


@pytest.fixture(scope="module")
def server(torch_engine: TorchEngine, export: Export, tokens, tmp_path_factory) -> Iterator[httpx.Client]:
    store = UserStore(f"sqlite:///{tmp_path_factory.mktemp('s')}/users.sqlite3")
    with running(create_app(torch_engine, export, store=store, keys=Keys(Path(tokens["file"])))) as client:
        yield client
    store.close()


def get(server: httpx.Client, token: str, path: str, **params) -> httpx.Response:
    return server.get(path, params=params or None, headers={"authorization": f"Bearer {token}"})


def ids(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [item["item_id"] for item in answer.json()["items"]]


@pytest.mark.parametrize(
    ("query", "category"), [("", None), ("LAMP red", None), ("number", "sofa"), ("chair", "sofa"), (SLASHED, None)]
)
def test_items_are_those_that_hold_every_word_the_most_popular_first(
    server: httpx.Client, export: Export, tokens, query: str, category: str | None
) -> None:
    catalogue = export.catalogue
    wanted = []
    for row in range(len(catalogue)):
        text = f"{catalogue.titles[row]} {' '.join(catalogue.categories[row])} {catalogue.item_ids[row]}".lower()
        if all(word in text for word in query.lower().split()) and category in (None, *catalogue.categories[row]):
            wanted.append(row)
    wanted.sort(key=lambda row: (-export.popularity[row], row))
    params = {"query": query, "limit": 100} | ({} if category is None else {"category": category})
    found = get(server, tokens["recommend"], "/v1/items", **params)
    assert ids(found) == [catalogue.item_ids[row] for row in wanted]
    assert ids(get(server, tokens["recommend"], "/v1/items", **{**params, "limit": 3})) == ids(found)[:3]


def test_an_item_says_what_the_catalogue_says(server: httpx.Client, export: Export, tokens) -> None:
    wanted = ["item-11", SLASHED, "item-3", "item-0"]
    answer = get(server, tokens["recommend"], "/v1/items", item_id=wanted).json()["items"]
    assert [item["item_id"] for item in answer] == wanted
    for item in answer:
        row = export.catalogue.index[item["item_id"]]
        assert (item["title"], item["categories"]) == (export.catalogue.titles[row], export.catalogue.categories[row])
        price = export.catalogue.prices[row]
        assert item["price"] is None if np.isnan(price) else item["price"] == pytest.approx(price, abs=0.005)
        assert item["available"] == export.catalogue.available[row]
        assert (item["image"] is None) == (export.catalogue.images[row] is None)
    assert {item["price"] for item in answer} > {None}  # one of them has none
    assert not answer[2]["available"]


def test_a_disabled_item_is_not_available(server: httpx.Client, tokens) -> None:
    admin = {"authorization": f"Bearer {tokens['admin']}"}
    for change, available in (("disable", False), ("enable", True)):
        assert server.post("/v1/items", json={change: ["item-9"]}, headers=admin).status_code == 200
        (item,) = get(server, tokens["recommend"], "/v1/items", item_id="item-9").json()["items"]
        assert item["available"] is available


def test_categories_are_counted(server: httpx.Client, export: Export, tokens) -> None:
    counts = Counter(name for names in export.catalogue.categories for name in names)
    answer = get(server, tokens["recommend"], "/v1/categories").json()["categories"]
    assert {category["name"]: category["items"] for category in answer} == counts
    assert [category["items"] for category in answer] == sorted(counts.values(), reverse=True)


def test_a_picture_comes_small_and_bare(server: httpx.Client, export: Export, tokens) -> None:
    """Decoded and written anew: its pixels, no larger than a thumbnail, and nothing else of the file."""
    assert SECRET.encode() in Path(str(export.catalogue.images[1])).read_bytes()
    paths = [
        item["image"]
        for item in get(server, tokens["recommend"], "/v1/items", item_id=["item-1", SLASHED]).json()["items"]
    ]
    sizes = []
    for path, colour in zip(paths, ((255, 0, 0), (0, 0, 255)), strict=True):
        answer = get(server, tokens["recommend"], path)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
        assert SECRET.encode() not in answer.content
        with Image.open(io.BytesIO(answer.content)) as image:
            assert image.format == "JPEG"
            assert image.convert("RGB").getpixel((5, 5)) == pytest.approx(colour, abs=3)
            sizes.append(image.size)
    assert sizes == [(thumbnails.SIDE, thumbnails.SIDE // 2), (64, 48)]


@pytest.mark.parametrize(
    "item", ["item-0", "item-3", "item-4", "nothing", "..%2F..%2F..%2Fetc%2Fpasswd", "%2Fetc%2Fpasswd", "1.png", "x%00"]
)
def test_no_picture_is_a_404_that_shows_no_file(server: httpx.Client, tokens, item: str) -> None:
    answer = get(server, tokens["recommend"], f"/v1/items/{item}/image")
    assert answer.status_code == 404
    assert "no picture" in answer.json()["error"]
    assert "root:" not in answer.text
    assert "/" not in answer.json()["error"].replace("/v1/items", "")


def test_a_picture_that_is_too_large_is_not_decoded(export: Export, monkeypatch, caplog) -> None:
    path = str(export.catalogue.images[5])
    assert thumbnails.Thumbnails().jpeg(path) is not None
    monkeypatch.setattr(thumbnails, "MAX_PIXELS", 3000 * 3000 - 1)
    assert thumbnails.Thumbnails().jpeg(path) is None
    assert "no picture: " in caplog.text


def test_a_history_is_its_tenants(server: httpx.Client, tokens) -> None:
    events = [
        {"user_id": user, "item_id": item} for user, item in (("ann", "item-1"), ("b/ob", "item-7"), ("ann", SLASHED))
    ]
    writer = {"authorization": f"Bearer {tokens['write']}"}
    assert server.post("/v1/events", json={"events": events}, headers=writer).json()["stored"] == 3
    assert ids(get(server, tokens["read"], "/v1/users/ann/history")) == ["item-1", SLASHED]
    assert ids(get(server, tokens["read"], "/v1/users/b%2Fob/history")) == ["item-7"]
    assert get(server, tokens["read"], "/v1/users").json() == {"users": ["ann", "b/ob"]}
    assert get(server, tokens["read"], "/v1/users", limit=1).json() == {"users": ["ann"]}
    assert ids(get(server, tokens["news"], "/v1/users/ann/history")) == []
    assert get(server, tokens["news"], "/v1/users").json() == {"users": []}


@pytest.mark.parametrize(
    ("path", "scope"),
    [
        ("/v1/items", "recommend"),
        ("/v1/items/item-1/image", "recommend"),
        ("/v1/categories", "recommend"),
        ("/v1/users", "read"),
        ("/v1/users/ann/history", "read"),
    ],
)
def test_each_read_takes_its_scope_only(server: httpx.Client, tokens, path: str, scope: str) -> None:
    assert server.get(path).status_code == 401
    for other in ("recommend", "read", "write", "admin", "metrics"):
        answer = get(server, tokens[other], path)
        assert answer.status_code == (200 if other == scope else 403)
        assert other == scope or f"lacks the scope {scope!r}" in answer.json()["error"]


def test_the_scope_of_a_read_opens_no_other_method(server: httpx.Client, tokens) -> None:
    for token in (tokens["recommend"], tokens["read"]):
        header = {"authorization": f"Bearer {token}"}
        assert server.post("/v1/items", json={"disable": ["item-1"]}, headers=header).status_code == 403
        assert server.request("DELETE", "/v1/users/ann/history", headers=header).status_code == 403


def test_bad_questions_say_what_is_wrong(server: httpx.Client, tokens) -> None:
    for params, words in (
        ({"limit": 0}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"query": "x" * 201}, "query"),
        ({"category": "lampp"}, "did you mean 'lamp'"),
        ({"item_id": ["item-1", "nothing"]}, "'nothing'"),
    ):
        answer = get(server, tokens["recommend"], "/v1/items", **params)
        assert (answer.status_code, words in answer.json()["error"]) == (422, True), answer.text


def test_paths_with_names_are_one_route_in_the_metrics(server: httpx.Client, tokens) -> None:
    for i in range(5):
        get(server, tokens["recommend"], f"/v1/items/made-up-{i}/image")
    text = get(server, tokens["metrics"], "/metrics").text
    assert "made-up" not in text
    assert 'route="/v1/items/{item_id:path}/image"' in text


def test_without_a_store_there_are_no_users(torch_engine: TorchEngine, export: Export) -> None:
    with running(create_app(torch_engine, export)) as client:
        answer = client.get("/v1/users")
    assert answer.status_code == 422
    assert "--store" in answer.json()["error"]


# -- the page's files ------------------------------------------------------------------------------------------


def test_the_page_is_public_and_may_run_nothing_but_its_own_file(server: httpx.Client) -> None:
    page = server.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    rules = dict(rule.strip().split(" ", 1) for rule in page.headers["content-security-policy"].split(";"))
    assert (rules["default-src"], rules["script-src"]) == ("'none'", "'self'")
    assert "unsafe" not in page.headers["content-security-policy"]
    for path, kind in (("/page.js", "text/javascript"), ("/page.css", "text/css")):
        assert f'"{path}"' in page.text
        answer = server.get(path)
        assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (200, kind)
        assert answer.headers["x-content-type-options"] == "nosniff"
    with http(str(server.base_url), headers={"authorization": "Bearer nonsense"}) as client:
        assert client.get("/").status_code == 200
