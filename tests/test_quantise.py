"""Quantised exports: smaller, loadable on the CPU, close to the original, and honest about what they cost."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from genrec.config import Serve
from genrec.errors import ArtefactError, ConfigError
from genrec.metrics import paired
from genrec.serving.engine import RecommendRequest, TextRequest
from genrec.serving.export import Export
from genrec.serving.quantise import (
    BITSANDBYTES,
    METHODS,
    bfloat16_bytes,
    bless,
    compare_exports,
    folder_bytes,
    quantise_export,
)
from genrec.serving.torch_engine import TorchEngine
from genrec.splits import Cases
from tests.export_fixture import make_export

QUANTISED = {"int8": "Linear8bitLt", "nf4": "Linear4bit"}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    export = make_export(folder)
    for method in BITSANDBYTES:
        assert quantise_export(export, folder, method) == folder / f"export-{method}"
    return folder


@pytest.fixture(scope="module")
def engines(run_dir: Path) -> dict[str, TorchEngine]:
    return {name: TorchEngine(Export.load(run_dir / name), "cpu") for name in ("export", "export-int8", "export-nf4")}


def cases(n: int = 60) -> Cases:
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 60, 5).astype(np.int32) for _ in range(n)]
    return Cases(np.arange(n), histories, rng.integers(0, 60, n).astype(np.int32))


@pytest.mark.parametrize("method", BITSANDBYTES)
def test_blocks_are_quantised_and_the_rest_is_not(run_dir: Path, engines, method: str) -> None:
    model, original = engines[f"export-{method}"].model, engines["export"].model
    kinds = {name: type(module).__name__ for name, module in model.lm.named_modules()}
    assert kinds["lm_head"] == "Linear"
    assert kinds["model.layers.0.self_attn.q_proj"] == QUANTISED[method]
    # NF4's blocks of 64 do not divide this model's 96 inputs
    assert kinds["model.layers.1.mlp.down_proj"] == ("Linear8bitLt" if method == "int8" else "Linear")
    assert torch.equal(model.embedding, original.embedding)
    assert torch.equal(model._head, original._head)
    quantised, whole = run_dir / f"export-{method}", run_dir / "export"
    for name in ("soft.safetensors", "adapter.safetensors"):
        before, after = load_file(whole / name), load_file(quantised / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    same = ("items/catalog.parquet", "items/codes.npy", "items/popularity.npy", "model/tokenizer.json")
    assert all((whole / name).read_bytes() == (quantised / name).read_bytes() for name in same)
    assert not (quantised / "model" / "generation_config.json").exists()


@pytest.mark.parametrize("method", BITSANDBYTES)
def test_the_manifest_names_method_and_bytes(run_dir: Path, method: str) -> None:
    folder = run_dir / f"export-{method}"
    found = json.loads((folder / "manifest.json").read_text())["result"]["quantised"]
    assert found["method"] == method
    assert found["bytes"] == folder_bytes(folder / "model")
    assert found["original_bytes"] == folder_bytes(run_dir / "export" / "model")
    assert found["bytes"] < 0.5 * found["original_bytes"]
    assert "lm_head" in found["kept_whole"]


@pytest.mark.parametrize("method", BITSANDBYTES)
def test_scores_move_a_little(engines, method: str) -> None:
    """Rounded weights move scores, by less than other weights would."""
    request = [RecommendRequest(["item-1", "item-5"], k=60)]
    scores = {
        name: {item.item_id: item.score for item in engine.recommend(request)[0]} for name, engine in engines.items()
    }
    whole, quantised = scores["export"], scores[f"export-{method}"]
    assert whole.keys() == quantised.keys()
    distance = np.array([abs(whole[item] - quantised[item]) for item in whole])
    assert 0 < distance.mean() < {"int8": 0.05, "nf4": 0.4}[method]
    assert np.ptp(list(whole.values())) > 3  # natural range of the scores
    (text,) = engines[f"export-{method}"].generate([TextRequest("item-3", max_tokens=4)])
    assert len(text.token_ids) == 4


def test_the_comparison_is_right(engines, run_dir: Path) -> None:
    asked = cases()
    whole, int8, nf4 = compare_exports(
        engines["export"], (engines[f"export-{method}"] for method in BITSANDBYTES), asked, n_boot=200
    )
    assert [row["export"] for row in (whole, int8, nf4)] == ["export", "export-int8", "export-nf4"]
    assert {row["engine"] for row in (whole, int8, nf4)} == {"torch"}
    assert (whole["overlap@10"], whole["change"], whole["ci95"]) == (1.0, 0.0, [0.0, 0.0])
    assert nf4["overlap@10"] < int8["overlap@10"] <= 1
    assert nf4["bytes"] == folder_bytes(run_dir / "export-nf4" / "model")
    gains, tops = {}, {}
    for name in ("export", "export-nf4"):
        ids = [f"item-{row}" for row in range(60)]
        requests = [RecommendRequest([ids[row] for row in history]) for history in asked.histories]
        lists = [[item.item_id for item in items] for items in engines[name].recommend(requests)]
        places = [
            items.index(ids[target]) + 2 if ids[target] in items else 0
            for items, target in zip(lists, asked.targets, strict=True)
        ]
        gains[name] = np.array([1 / np.log2(place) if place else 0.0 for place in places])
        tops[name] = [set(items) for items in lists]
    overlap = [len(a & b) / 10 for a, b in zip(tops["export"], tops["export-nf4"], strict=True)]
    assert nf4["overlap@10"] == pytest.approx(np.mean(overlap))
    assert nf4["ndcg@10"] == pytest.approx(gains["export-nf4"].mean())
    expected = paired(gains["export-nf4"], gains["export"], 200, 0)
    assert nf4["change"] == pytest.approx(expected["mean"])
    assert nf4["ci95"] == pytest.approx(expected["ci95"])
    assert nf4["users"] == 60


def test_bytes_are_measured_against_bfloat16(engines, run_dir: Path, tmp_path: Path) -> None:
    """Whatever the export is in: the same model saved by transformers in bfloat16 tells how many there would be."""
    whole = run_dir / "export"
    assert load_file(whole / "model" / "model.safetensors")["model.embed_tokens.weight"].dtype == torch.float32
    half = tmp_path / "export"
    shutil.copytree(whole, half)
    AutoModelForCausalLM.from_pretrained(whole / "model", dtype=torch.bfloat16).save_pretrained(half / "model")
    (half / "model" / "generation_config.json").unlink()
    expected = folder_bytes(half / "model")
    headers = 500  # of the safetensors files, which name the types
    assert bfloat16_bytes(whole / "model") == pytest.approx(expected, abs=headers)
    assert bfloat16_bytes(half / "model") == expected
    rows = compare_exports(engines["export"], [TorchEngine(Export.load(half), "cpu")], cases(5), n_boot=100)
    sizes = np.array([folder_bytes(whole / "model"), expected])
    assert [row["share"] for row in rows] == pytest.approx(sizes / expected, rel=headers / expected)


@pytest.mark.parametrize(("overlap", "served"), [(0.951, True), (0.95, True), (0.949, False)])
def test_each_method_has_its_own_demand(run_dir: Path, tmp_path: Path, overlap: float, served: bool) -> None:
    least = Serve().min_overlap
    assert least.model_dump().keys() == METHODS.keys()
    assert (least.int8, least.nf4) == (0.95, 0.8)
    copy = Path(shutil.copytree(run_dir / "export-int8", tmp_path / "export-int8"))
    assert bless(copy, "int8", overlap, least.int8) == served
    if served:
        Export.load(copy)
    else:
        with pytest.raises(ArtefactError, match=r"0\.949 of the top 10 .* serve\.min_overlap\.int8 demands 0\.95;"):
            Export.load(copy)


def test_unchanged_exports_are_skipped(run_dir: Path) -> None:
    manifest = run_dir / "export-nf4" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    quantise_export(run_dir / "export", run_dir, "nf4")
    assert manifest.stat().st_mtime_ns == before


def test_wrong_wishes_are_refused(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match="no quantisation named 'int4'; there are int8, nf4, w8a8, w4a16"):
        quantise_export(run_dir / "export", run_dir, "int4")
    with pytest.raises(ConfigError, match="already quantised"):
        quantise_export(run_dir / "export-int8", run_dir, "nf4")
