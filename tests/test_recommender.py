"""The front door, from a folder to items and text."""

from pathlib import Path

import pytest

from genrec import Recommender
from genrec.errors import ArtefactError, ConfigError, DataError
from genrec.prompts import prompt_version
from genrec.serving.engine import RecommendRequest, TextRequest
from genrec.serving.export import Export
from genrec.serving.torch_engine import TorchEngine
from tests.export_fixture import make_export


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_export(tmp_path_factory.mktemp("e"))


def test_it_answers_as_its_engine(folder: Path) -> None:
    engine = TorchEngine(Export.load(folder))
    history = ["item-1", "item-8"]
    with Recommender.load(str(folder), engine="torch") as recommender:
        found = recommender.recommend(history, k=4, categories=["lamp"], price_max=80.0)
        wish = RecommendRequest(history, 4, categories=["lamp"], price_max=80.0)
        assert found == engine.recommend([wish])[0]
        assert [item.rank for item in found] == [1, 2, 3, 4]
        assert len(recommender.recommend([])) == 10
        text = recommender.describe(history, "item-2", max_tokens=6, temperature=0.7, seed=3)
        assert str(text) == engine.generate([TextRequest("item-2", history, 6, 0.7, 3)])[0].text
        assert text.provenance.generated
        assert (text.provenance.item_id, text.provenance.seed) == ("item-2", 3)
        for task in ("explain", "headline"):
            asked = TextRequest("item-2", history, 6, task=task, style="long playful")
            written = getattr(recommender, task)(history, "item-2", max_tokens=6, style="long playful")
            assert written.text == engine.generate([asked])[0].text
            assert written.provenance.prompt == prompt_version(task)
            assert written.provenance.export == str(recommender.export.manifest["key"])[:12]
        with pytest.raises(DataError, match="style 'rude'"):
            recommender.describe([], "item-2", style="rude")
        assert recommender.export.catalogue.item_ids[0] == "item-0"


def test_errors_pass_through(folder: Path, tmp_path: Path) -> None:
    with Recommender.load(folder, engine="torch") as recommender:
        with pytest.raises(DataError, match="'nope'"):
            recommender.recommend(["nope"])
        with pytest.raises(TypeError, match="colour"):
            recommender.recommend([], colour="red")
    with pytest.raises(ConfigError, match="no engine named 'tpu'"):
        Recommender.load(folder, engine="tpu")
    with pytest.raises(ArtefactError, match=r"no manifest\.json"):
        Recommender.load(tmp_path)
