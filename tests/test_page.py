"""The page in a real Chromium, against a real gateway with a real engine and store."""

import asyncio
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.responses import StreamingResponse

from genrec.artefacts import MANIFEST, write_json
from genrec.serving.api_keys import Keys, add_key
from genrec.serving.export import Export
from genrec.serving.gateway import create_app
from genrec.serving.torch_engine import TorchEngine
from genrec.serving.user_store import Event, UserStore
from genrec.synthetic_pictures import draw_picture
from tests.gateway_fixture import PATIENCE_S, running, until

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make env")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]
HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>\'}}{{7*7}}'
ANN = ["item-1", "item-2", "item-5"]  # of which 5 has no picture
WIDE, PHONE = {"width": 1200, "height": 800}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def export(torch_engine: TorchEngine, tmp_path_factory) -> Export:
    """Most items with a drawn picture, and one whose title is markup."""
    folder, rng, catalogue = (
        tmp_path_factory.mktemp("pictures"),
        np.random.default_rng(0),
        torch_engine.export.catalogue,
    )
    images: list[str | None] = []
    for row in range(len(catalogue)):
        path = folder / f"{row}.png"
        draw_picture(row % 8, row % 10, row % 4, rng).save(path)
        images.append(None if row % 5 == 0 else str(path))
    titles = [HOSTILE, *catalogue.titles[1:]]
    manifest = torch_engine.export.manifest
    manifest = {**manifest, "result": {**manifest["result"], "tasks": ["explain"]}}
    copy = shutil.copytree(torch_engine.export.folder, folder / "export")
    write_json(copy / MANIFEST, manifest)  # the gateway looks whether it is still the export that was loaded
    return dataclasses.replace(
        torch_engine.export,
        folder=copy,
        catalogue=dataclasses.replace(catalogue, images=images, titles=titles),
        manifest=manifest,
    )


@pytest.fixture(scope="module")
def server(torch_engine: TorchEngine, export: Export, tmp_path_factory) -> Iterator[httpx.Client]:
    store = UserStore(f"sqlite:///{tmp_path_factory.mktemp('s')}/users.sqlite3")
    store.append("local", [Event("ann", item) for item in ANN] + [Event(HOSTILE, "item-0")])
    with running(create_app(torch_engine, export, store=store)) as client:
        yield client
    store.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


class Visit:
    """An open page, and what its console said."""

    def __init__(self, browser: Any, url: str, viewport: dict[str, int]) -> None:
        self.page = browser.new_page(viewport=viewport)
        self.page.set_default_timeout(PATIENCE_S * 1000)
        self.complaints: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(url)

    def _hear(self, line: Any) -> None:
        if line.type == "error":
            self.complaints.append(line.text)

    def titles(self, where: str) -> list[str]:
        return self.page.locator(f"{where} .title").all_text_contents()

    def settled(self, words: str = "items, best first") -> None:
        sync_api.expect(self.page.locator("#list-status")).to_contain_text(words, timeout=PATIENCE_S * 1000)

    def user(self, name: str) -> None:
        self.page.get_by_label("Name or id").fill(name)
        self.page.get_by_role("button", name="Show").click()
        sync_api.expect(self.page.locator("#user-hint")).to_contain_text("stored events", timeout=PATIENCE_S * 1000)
        self.settled()


@pytest.fixture
def visit(browser, server: httpx.Client) -> Iterator[Visit]:
    made = Visit(browser, str(server.base_url), WIDE)
    made.settled()
    yield made
    made.page.close()


def titles_of(export: Export, ids: list[str]) -> list[str]:
    return [export.catalogue.titles[export.catalogue.index[item]] for item in ids]


def recommended(server: httpx.Client, **wish) -> list[str]:
    answer = server.post("/v1/recommend", json={"k": 12, **wish})
    return [item["item_id"] for item in answer.json()["items"]]


def test_a_user_sees_history_recommendations_pictures_and_reasons(visit: Visit, server, export: Export) -> None:
    names = visit.page.locator("#users option").evaluate_all("options => options.map(option => option.value)")
    assert sorted(names) == sorted(["ann", HOSTILE])
    visit.user("ann")
    assert visit.titles("#history") == titles_of(export, ANN[::-1])
    wanted = recommended(server, user_id="ann")
    assert visit.titles("#recommended") == titles_of(export, wanted)

    def seen_pictures() -> bool:
        cards = visit.page.locator("#history .item").all()
        widths = [card.locator("img").evaluate_all("all => all.map(image => image.naturalWidth)") for card in cards]
        return widths == [[], [64], [64]]  # the newest has none: a letter stands there

    until(seen_pictures, "the pictures of the history")
    ask = {"user_id": "ann", "item_id": wanted[0], "task": "explain", "max_tokens": 40}
    reason = visit.page.locator("#recommended .reason").first
    sync_api.expect(reason).not_to_have_text("…", timeout=PATIENCE_S * 1000)
    sync_api.expect(reason).to_have_text(server.post("/v1/describe", json=ask).json()["text"])
    assert visit.complaints == []


def test_filters_reach_the_list(visit: Visit, server, export: Export) -> None:
    visit.page.get_by_label("Reasons").uncheck()
    visit.page.get_by_label("Category").select_option("lamp")
    visit.page.get_by_label("Price from").fill("20")
    visit.page.get_by_label("Price to").fill("60.5")
    visit.page.get_by_role("button", name="Recommend").click()
    wanted = recommended(server, history=[], categories=["lamp"], price_min=20, price_max=60.5)
    assert 0 < len(wanted) < 12
    until(lambda: visit.titles("#recommended") == titles_of(export, wanted), "the filtered list")
    visit.page.get_by_label("Price from").fill("60.4")
    visit.page.get_by_role("button", name="Recommend").click()
    visit.settled("No item passes these filters")
    assert visit.titles("#recommended") == []
    assert visit.complaints == []


def test_what_is_added_is_stored_and_changes_the_list(visit: Visit, server, export: Export) -> None:
    visit.page.get_by_label("Reasons").uncheck()
    visit.page.get_by_label("Name or id").fill("new user")
    visit.page.keyboard.press("Enter")
    sync_api.expect(visit.page.locator("#user-hint")).to_contain_text("A new user")
    visit.page.get_by_label("Add an item to the history").fill("lamp number 16")
    visit.page.keyboard.press("Enter")
    visit.page.get_by_role("button", name="Add: green lamp number 16").click()
    until(lambda: len(visit.titles("#history")) == 1, "the item in the history")

    def stored() -> list[str]:
        return [item["title"] for item in server.get("/v1/users/new%20user/history").json()["items"]]

    assert stored() == visit.titles("#history")
    until(
        lambda: visit.titles("#recommended") == titles_of(export, recommended(server, user_id="new user")), "the list"
    )
    assert visit.complaints == []


def test_without_a_user_the_history_stays_on_the_page(visit: Visit, server, export: Export) -> None:
    visit.page.get_by_label("Reasons").uncheck()
    visit.page.locator("#search").fill("chair")
    visit.page.keyboard.press("Enter")
    visit.page.locator("#found button").first.click()
    until(lambda: len(visit.titles("#history")) == 1, "the item in the history")
    (title,) = visit.titles("#history")
    item = export.catalogue.item_ids[export.catalogue.titles.index(title)]
    until(lambda: visit.titles("#recommended") == titles_of(export, recommended(server, history=[item])), "the list")
    visit.page.get_by_role("button", name=f"Remove: {title}").click()
    until(lambda: visit.titles("#recommended") == titles_of(export, recommended(server, history=[])), "the list again")


def test_hostile_text_stays_text(visit: Visit) -> None:
    """A title and a user id that are markup: shown letter by letter, nothing of them runs."""
    visit.user(HOSTILE)
    assert visit.titles("#history") == [HOSTILE]
    assert visit.page.evaluate("window.hacked") is None
    assert visit.page.locator("main img[src=x], main script").count() == 0
    assert visit.complaints == []


def test_the_page_runs_no_foreign_script(visit: Visit) -> None:
    """The control of the test above: markup that does get in is stopped by the page's policy."""
    with pytest.raises(Exception, match="TrustedHTML"):
        visit.page.evaluate("text => { document.querySelector('main').innerHTML = text }", HOSTILE)
    assert visit.page.evaluate("fetch('https://example.com/').then(() => 'sent', () => 'blocked')") == "blocked"
    assert any("Content Security Policy" in line for line in visit.complaints)


@pytest.mark.parametrize("viewport", [WIDE, PHONE], ids=["wide", "phone"])
def test_the_layout_fits_the_screen(browser, server: httpx.Client, viewport: dict[str, int]) -> None:
    visit = Visit(browser, str(server.base_url), viewport)
    visit.settled()
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    boxes = {name: visit.page.locator(f"#{name}").bounding_box() for name in ("user", "list", "chat")}
    one_column = len({box["x"] for box in boxes.values()}) == 1
    assert one_column == (viewport is PHONE)
    for control in visit.page.locator("main button:visible, main input:visible, main select:visible").all():
        if control.get_attribute("type") != "checkbox":
            assert control.bounding_box()["height"] >= 44 - 0.5  # wide enough for a thumb
    visit.page.close()


def test_keyboard_and_screen_readers_reach_everything(visit: Visit) -> None:
    """Every control has a name, Tab visits them in reading order with a visible outline, and the page has no traps."""
    nameless = (
        "all => all.filter(e => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map(e => e.outerHTML)"
    )
    assert visit.page.locator("input, select, textarea, button").evaluate_all(nameless) == []
    levels = visit.page.locator("h1, h2, h3").evaluate_all("all => all.map(e => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    reached, bare = [], []
    for _ in range(40):
        visit.page.keyboard.press("Tab")
        name, markup, outline = visit.page.evaluate(
            "(e => [e.id, e.outerHTML.slice(0, 80), getComputedStyle(e).outlineStyle])(document.activeElement)"
        )
        reached.append(name)
        if outline == "none" and not markup.startswith("<body"):  # past the last control the window has the focus
            bare.append(markup)
    order = ["user-id", "search", "category", "price-min", "price-max", "reasons", "message", "send"]
    assert [name for name in reached if name in order][: len(order)] == order
    assert bare == []


def test_a_server_without_chat_says_so(visit: Visit) -> None:
    visit.page.get_by_label("Your wish").fill("something blue")
    visit.page.keyboard.press("Enter")
    sync_api.expect(visit.page.locator("#chat-status")).to_contain_text("no chat")
    assert visit.page.locator("#log .user").count() == 1


def test_a_model_that_learned_no_reasons_is_not_asked_for_them(browser, torch_engine: TorchEngine) -> None:
    assert torch_engine.export.tasks == []
    with running(create_app(torch_engine, torch_engine.export)) as plain:
        visit = Visit(browser, str(plain.base_url), WIDE)
        sync_api.expect(visit.page.locator("#recommended .item").first).to_be_visible(timeout=PATIENCE_S * 1000)
        assert not visit.page.get_by_label("Reasons").is_checked()
        assert set(visit.page.locator("#recommended .reason").all_text_contents()) == {""}
        visit.page.close()


def test_the_chat_streams_and_shows_its_items(browser, torch_engine: TorchEngine, export: Export) -> None:
    """Chunks in OpenAI's form, one of them held back: what came before it is on the screen already."""
    app, asked = create_app(torch_engine, export), []
    go_on = asyncio.Event()

    def chunk(words: str, **more) -> str:
        return f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': words}}], **more})}\n\n"

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any]) -> StreamingResponse:
        asked.append(body)

        async def stream():
            text = chunk(f"Take {HOSTILE} ☂")
            yield text[:25]  # a chunk may end anywhere
            yield text[25:]
            await go_on.wait()
            item = {"id": "item-0", "title": HOSTILE, "image": None, "score": -1.0, "reason": HOSTILE}
            yield chunk(" now", genrec={"items": [item]})
            yield "data: [DONE]\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    @app.get("/go-on")
    async def release() -> None:
        go_on.set()

    with running(app) as client:
        visit = Visit(browser, str(client.base_url), WIDE)
        visit.settled()
        visit.page.get_by_label("Your wish").fill("a lamp")
        visit.page.keyboard.press("Enter")
        answer = visit.page.locator("#log .assistant > span:not(.who)")
        sync_api.expect(answer).to_have_text(f"Take {HOSTILE} ☂")
        client.get("/go-on")
        sync_api.expect(answer).to_have_text(f"Take {HOSTILE} ☂ now")
        sync_api.expect(visit.page.locator("#log .title")).to_have_text(HOSTILE)
        visit.page.get_by_label("Your wish").fill("cheaper")
        visit.page.get_by_role("button", name="Send").click()
        until(lambda: len(asked) == 2, "the second question")
        assert visit.page.evaluate("window.hacked") is None
        assert [(m["role"], m["content"]) for m in asked[1]["messages"]] == [
            ("user", "a lamp"),
            ("assistant", f"Take {HOSTILE} ☂ now"),
            ("user", "cheaper"),
        ]
        assert asked[1]["stream"] is True
        visit.page.close()


def test_a_key_opens_the_page(browser, torch_engine: TorchEngine, export: Export, tmp_path: Path) -> None:
    token = add_key(tmp_path / "keys.json", "shop", ["recommend", "read", "write"], {})
    with running(create_app(torch_engine, export, keys=Keys(tmp_path / "keys.json"))) as client:
        visit = Visit(browser, str(client.base_url), WIDE)
        visit.settled("asks for an API key")
        visit.page.get_by_label("API key").fill(token)
        visit.page.get_by_role("button", name="Use it").click()
        visit.settled()
        until(lambda: visit.page.locator("#recommended img").count() > 0, "a picture, which needs the key too")
        assert visit.titles("#recommended")
        visit.page.close()
