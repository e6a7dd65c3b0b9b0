"""An export replaced while it is loaded or served: what was loaded goes on, nothing is mixed, /readyz says so."""

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from genrec.catalog import Catalogue
from genrec.errors import ArtefactError
from genrec.serving.desk import Settings
from genrec.serving.engine import RecommendRequest, TextRequest
from genrec.serving.export import Export
from genrec.serving.gateway import create_app
from genrec.serving.quantise import quantise_export
from genrec.serving.torch_engine import TorchEngine
from tests.engines import FaultyEngine
from tests.export_fixture import make_export
from tests.gateway_fixture import PATIENCE_S, running, until

ASK: dict[str, Any] = {"history": ["item-1"], "k": 5}
REASON = "the export's folder holds another export now; restart to serve it"
REFUSED = r"export: holds another export now than when it was loaded \(key \w{12}\); load it again"


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> tuple[Path, Path]:
    """Two exports of the same items with other weights, ids and soft tokens."""
    a, b = (make_export(tmp_path_factory.mktemp(str(seed)), seed=seed) for seed in (0, 1))
    return a, b


@pytest.fixture
def folder(originals: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(originals[0], tmp_path / "export"))


@pytest.fixture
def replace(originals: tuple[Path, Path], folder: Path) -> Callable[[int], None]:
    """Put a fresh copy of an original into the folder's place, by rename."""

    def by(which: int) -> None:
        new = folder.with_name("new")
        shutil.copytree(originals[which], new)
        folder.rename(folder.with_name(f"old-{len(list(folder.parent.iterdir()))}"))
        new.rename(folder)

    return by


def listed(folder: Path) -> list[str]:
    """What an engine that was started on a folder answers."""
    return [item.item_id for item in TorchEngine(Export.load(folder), "cpu").recommend([RecommendRequest(**ASK)])[0]]


def test_answers_stay_those_of_the_loaded_export_and_readyz_says_so(originals, folder, replace) -> None:
    export = Export.load(folder)
    engine = FaultyEngine(TorchEngine(export, "cpu"))
    old, new = listed(originals[0]), listed(originals[1])
    assert old != new  # or the test could not tell
    with running(create_app(engine, export, settings=Settings(refresh_s=0.02))) as client:

        def ask() -> dict[str, Any]:
            return client.post("/v1/recommend", json={**ASK, "timeout_ms": 30_000}).json()

        def ids(answer: dict[str, Any]) -> list[str]:
            assert not answer["fallback"]
            assert answer["export"] == export.manifest["key"][:12]
            return [item["item_id"] for item in answer["items"]]

        assert client.get("/readyz").status_code == 200
        engine.hang.clear()
        with ThreadPoolExecutor(1) as pool:
            flying = pool.submit(ask)
            engine.inside.acquire()
            replace(1)
            until(lambda: client.get("/readyz").status_code == 503, "readyz to see the new export")
            engine.hang.set()
            assert ids(flying.result(PATIENCE_S)) == old
        assert client.get("/readyz").json() == {"ready": False, "reasons": [REASON]}
        assert "genrec_ready 0.0" in client.get("/metrics").text
        assert client.get("/healthz").status_code == 200  # a restart is for whoever replaced it to choose
        assert ids(ask()) == old
        text = client.post("/v1/describe", json={"item_id": "item-3", "max_tokens": 4}).json()["text"]
        assert text == engine.within.generate([TextRequest("item-3", max_tokens=4)])[0].text
        replace(0)  # rolled back
        until(lambda: client.get("/readyz").status_code == 200, "readyz to see the old export")
        assert ids(ask()) == old
    assert listed(folder) == old


def test_the_same_export_again_or_none_is_not_another(folder, replace) -> None:
    export = Export.load(folder)
    replace(0)
    assert not export.replaced()
    manifest = folder / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole[: len(whole) // 2])  # half copied
    assert not export.replaced()
    shutil.rmtree(folder)
    assert not export.replaced()
    export.check_unchanged()


def test_a_watch_that_is_closed_looks_no_more(torch_engine: TorchEngine, monkeypatch) -> None:
    looked: list[Export] = []

    def look(self: Export) -> bool:
        looked.append(self)
        return False

    monkeypatch.setattr(Export, "replaced", look)
    with running(create_app(torch_engine, torch_engine.export, settings=Settings(refresh_s=0.01))):
        until(lambda: len(looked) > 2, "the watch to look")
    seen = len(looked)
    time.sleep(0.2)
    assert len(looked) <= seen + 1  # one may have been on its way


def test_a_replacement_while_loading_is_refused(folder, replace, monkeypatch) -> None:
    load = Catalogue.load

    def late(path: Path) -> Catalogue:
        found = load(path)
        replace(1)
        return found

    monkeypatch.setattr(Catalogue, "load", late)
    with pytest.raises(ArtefactError, match=REFUSED):
        Export.load(folder)


def test_a_replacement_before_the_model_is_read_is_refused(folder, replace) -> None:
    export = Export.load(folder)
    replace(1)
    with pytest.raises(ArtefactError, match=REFUSED):
        TorchEngine(export, "cpu")
    replace(0)
    TorchEngine(export, "cpu").recommend([RecommendRequest(**ASK)])


def test_a_copy_is_not_made_of_two_exports(folder, replace, tmp_path) -> None:
    export = Export.load(folder)

    def late(self: Export) -> Path:
        if self.folder == export.folder and not export.replaced():
            replace(1)
        return self.folder / "model"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Export, "model_dir", property(late))
        with pytest.raises(ArtefactError, match=REFUSED):
            quantise_export(folder, tmp_path / "run", "int8")
    assert not (tmp_path / "run" / "export-int8").exists()


@pytest.mark.vllm
def test_the_vllm_engine_starts_nothing_on_another_export(folder, replace, monkeypatch) -> None:
    """Its engine for texts starts with the first text, perhaps days after that for lists. No real one starts here."""
    pytest.importorskip("vllm", reason="needs the extra cpu or gpu")
    import torch

    from genrec.serving import vllm_engine
    from genrec.serving.vllm_engine import VllmEngine

    started: list[Any] = []
    stopped: list[Any] = []
    meanwhile: list[int] = []  # what takes the folder's place while an engine starts

    class Stub:
        dtype = torch.float32

        ended = False

        def __init__(self, start: Any) -> None:
            started.append(self)
            for which in meanwhile:
                replace(which)

        def stop(self) -> None:
            stopped.append(self)

    monkeypatch.setattr(vllm_engine, "VllmProcess", Stub)
    engine = VllmEngine(Export.load(folder), speculative=True)
    replace(1)
    for _ in range(2):
        with pytest.raises(ArtefactError, match=REFUSED):
            engine.generate([TextRequest("item-1")])
    assert (len(started), stopped) == (1, [])  # refused before a start that takes half a minute
    replace(0)

    meanwhile.append(1)
    with pytest.raises(ArtefactError, match=REFUSED):
        engine._running("texts")
    assert stopped == started[1:]
    assert len(stopped) == 1
    engine.close()
