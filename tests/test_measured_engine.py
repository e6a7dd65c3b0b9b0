"""`--engine auto` by measurement: the rule on given figures, the memory, and both engines for real."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path

import pytest
import torch

from genrec.serving import measured_engine, select_engine
from genrec.serving.engine import RecommendRequest, TextRequest
from genrec.serving.export import Export
from genrec.serving.measured_engine import DRAFTS, Choice, PairedEngine, Speeds, parts, remember, remembered
from genrec.serving.select_engine import make_engine
from genrec.serving.torch_engine import TorchEngine
from tests.export_fixture import make_export


@pytest.fixture
def export(tmp_path: Path, monkeypatch) -> Export:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Export.load(make_export(tmp_path))


@pytest.mark.parametrize(
    ("lists", "texts", "choice"),
    [
        ({"torch": 9}, {"torch": 1}, Choice("torch", "torch", False)),
        ({"torch": 9, "vllm": 8}, {"torch": 5, "vllm": 6, DRAFTS: 7.1}, Choice("torch", "vllm", False)),
        ({"torch": 9, "vllm": 8}, {"torch": 5, "vllm": 6, DRAFTS: 7.3}, Choice("torch", "vllm", True)),
        ({"torch": 8, "vllm": 9}, {"torch": 9, "vllm": 6, DRAFTS: 8}, Choice("vllm", "torch", False)),
        ({"torch": 8, "vllm": 9}, {"torch": 7, "vllm": 6, DRAFTS: 8}, Choice("vllm", "vllm", True)),
        ({"torch": 8, "vllm": 9}, {"torch": 7, "vllm": 8}, Choice("vllm", "vllm", False)),
    ],
)
def test_the_fastest_is_chosen_for_each_kind(lists, texts, choice) -> None:
    assert Speeds(lists, texts).choose() == choice


def test_speeds_are_remembered_for_this_export_alone(export, tmp_path, monkeypatch) -> None:
    speeds = Speeds({"torch": 1.5, "vllm": 2.5}, {"torch": 3.5, "vllm": 4.5, DRAFTS: 5.5})
    assert remembered(export) is None
    remember(export, speeds)
    assert remembered(export) == speeds
    other = Export.load(make_export(tmp_path / "other", seed=1))
    assert remembered(other) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "63")  # as good as another machine
    assert remembered(export) is None


def test_what_cannot_be_read_or_written_is_measured_again(export, tmp_path, monkeypatch, caplog) -> None:
    remember(export, Speeds({"torch": 1}, {"torch": 1}))
    (file,) = (tmp_path / "cache").rglob("*.json")
    for broken in ("", "{", '{"lists": {}}', json.dumps([1])):
        file.write_text(broken)
        assert remembered(export) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # a file where a folder is needed
    remember(export, Speeds({"torch": 1}, {"torch": 1}))
    assert "is not remembered" in caplog.text


def test_auto_takes_what_was_remembered_and_measures_only_when_told(export, monkeypatch, caplog) -> None:
    monkeypatch.setattr(select_engine, "vllm_obstacle", lambda method=None: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    measured: list[Export] = []

    def measure(of: Export) -> Speeds:
        measured.append(of)
        return Speeds({"torch": 7.0, "vllm": 2.0}, {"torch": 90.0, "vllm": 80.0})

    monkeypatch.setattr(select_engine, "measure", measure)
    with caplog.at_level(logging.INFO):
        assert make_engine(export).name == "torch"
        assert not measured
        assert "nothing was measured" in caplog.text
        assert make_engine(export, measure_first=True).name == "torch"
        assert measured == [export]
        assert make_engine(export, measure_first=True).name == "torch"
        assert measured == [export]
    assert "engine: torch for lists, torch for texts (users/s: torch 7.0, vllm 2.0; tokens/s: torch 90, vllm 80)" in (
        caplog.text
    )


def test_a_pair_asks_each_engine_for_its_own_kind(export) -> None:
    class Closed(TorchEngine):
        def recommend(self, requests):
            raise AssertionError("asked for lists")

    lists, texts = TorchEngine(export, "cpu"), Closed(export, "cpu")
    pair = PairedEngine(lists, texts)
    assert (pair.name, pair.export, parts(pair), parts(lists)) == ("torch+torch", export, (lists, texts), (lists,))
    wishes, words = [RecommendRequest(["item-1"])], [TextRequest("item-2", ["item-1"], 8)]
    assert pair.recommend(wishes) == lists.recommend(wishes)
    assert pair.generate(words) == lists.generate(words)
    later = dataclasses.replace(export)
    swap = pair.prepare(later)
    assert (lists.export, texts.export) == (export, export)
    swap()
    assert pair.export is lists.export is texts.export is later
    pair.close()
    assert not hasattr(lists, "model")
    assert not hasattr(texts, "model")


def test_an_engine_that_does_not_start_is_left_out(export, monkeypatch, caplog) -> None:
    pytest.importorskip("vllm", reason="needs the extra cpu or gpu")

    def broken(*_, **__):
        raise RuntimeError("no memory")

    monkeypatch.setattr("genrec.serving.vllm_engine.VllmEngine", broken)
    speeds = measured_engine.measure(export)
    assert speeds.lists.keys() == speeds.texts.keys() == {"torch"}
    assert min(*speeds.lists.values(), *speeds.texts.values()) > 0
    assert "vLLM cannot be measured: RuntimeError: no memory" in caplog.text


@pytest.mark.vllm
def test_both_engines_are_measured_and_the_choice_serves(export, monkeypatch, caplog) -> None:
    pytest.importorskip("vllm", reason="needs the extra cpu or gpu")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    with caplog.at_level(logging.INFO):
        engine = make_engine(export, "auto", measure_first=True)
    try:
        speeds = remembered(export)
        assert speeds is not None
        assert speeds.lists.keys() == {"torch", "vllm"}
        assert speeds.texts.keys() == {"torch", "vllm", DRAFTS}
        assert min(*speeds.lists.values(), *speeds.texts.values()) > 0
        choice = speeds.choose()
        assert [part.name for part in parts(engine)] in ([choice.lists], [choice.lists, choice.texts])
        assert str(speeds) in caplog.text
        assert len(engine.recommend([RecommendRequest(["item-1"], k=5)])[0]) == 5
        assert engine.generate([TextRequest("item-2", ["item-1"], 4)])[0].token_ids
    finally:
        engine.close()
