"""`genrec systems`: the list, a recipe in full, and a run on a real-looking catalogue without pictures."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from genrec.cli import app
from genrec.errors import ConfigError, DataError
from genrec.system_recipe import load_system, system_names
from genrec.system_run import run_system
from genrec.training import reconstruct

ITEMS, USERS, EVENTS = 40, 30, 7
REFUSED = {
    "dcmr": "item.modalities names audio, the data has image, text",
    "joint": "item.modalities names audio, the data has image, text",
    "unim2rec": "needs two domains",
    "uniembedding": "needs two domains",
}


@pytest.fixture(autouse=True)
def quick_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconstruct, "PRETRAIN", (3,))
    monkeypatch.setattr(reconstruct, "READS", -1.0)  # after three steps it reads nothing


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["oak", "pine", "steel", "lamp", "chair", "table", "red", "blue"]
    items = [
        {"item_id": f"i{n}", "title": " ".join(rng.choice(words, 3)), "categories": [f"c{n % 3}"]} for n in range(ITEMS)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    events = [(f"u{u}", f"i{i}", t) for u in range(USERS) for t, i in enumerate(rng.permutation(ITEMS)[:EVENTS])]
    users, taken, times = (list(of) for of in zip(*events, strict=True))
    pq.write_table(pa.table({"user_id": users, "item_id": taken, "timestamp": times}), folder / "interactions.parquet")
    return folder


@pytest.mark.parametrize("name", system_names())
def test_a_system_runs_on_a_catalogue_without_pictures_or_says_why_not(
    name: str, data: Path, tmp_path: Path, caplog: Any
) -> None:
    if name in REFUSED:
        with pytest.raises(ConfigError, match=re.escape(REFUSED[name])):
            run_system(load_system(name), data, tmp_path, steps=1)
        return
    with caplog.at_level(logging.WARNING, "genrec"):
        result = run_system(load_system(name), data, tmp_path, steps=1)
    assert "image: no item has it, so it is masked everywhere" in caplog.text
    features = np.load(result["features"])
    assert features.shape == (ITEMS, load_system(name).item.width)
    assert len(np.unique(features.round(6), axis=0)) > ITEMS / 2
    assert 0 <= result["metrics"][name]["ndcg@10"] <= 1


def test_pictures_alone_are_widened_to_text_and_it_says_so(data: Path, tmp_path: Path, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, "genrec"):
        run_system(load_system("cscnn"), data, tmp_path, steps=1)
    assert "some items have no image, so image and text are read" in caplog.text


def test_a_folder_without_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no items\.jsonl there"):
        run_system(load_system("cb2cf"), tmp_path, tmp_path)


def test_the_commands_list_show_and_run(data: Path, tmp_path: Path) -> None:
    listed = CliRunner().invoke(app, ["systems", "list"], env={"COLUMNS": "200"}).output
    assert all(name in listed for name in system_names())
    shown = CliRunner().invoke(app, ["systems", "show", "clcrec"]).output
    assert yaml.safe_load(shown)["stages"][0]["swap"] == 0.5
    done = CliRunner().invoke(
        app, ["systems", "run", "cb2cf", "--data", str(data), "--runs", str(tmp_path), "--steps", "1"]
    )
    assert done.exit_code == 0, done.output
    assert "popularity" in done.output
