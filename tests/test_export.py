"""Exports: what is refused, and that a whole one needs nothing but its folder. The model card too."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from genrec.errors import ArtefactError
from genrec.serving.engine import RecommendRequest
from genrec.serving.export import Export
from genrec.serving.model_card import model_card
from genrec.serving.torch_engine import TorchEngine
from tests.export_fixture import PADDING_ROWS, make_export


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_export(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def export_dir(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "export"))


def test_a_moved_export_answers_the_same(whole: Path, tmp_path: Path) -> None:
    request = [RecommendRequest(["item-1", "item-2"], k=5)]
    here = TorchEngine(Export.load(whole), "cpu").recommend(request)
    moved = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(whole, moved)
    assert TorchEngine(Export.load(str(moved)), "cpu").recommend(request) == here


def test_the_tokenizer_holds_the_added_tokens_at_the_layouts_ids(whole: Path) -> None:
    export = Export.load(whole)
    layout, tokenizer = export.layout, export.tokenizer
    strings = layout.token_strings()
    ids = list(range(layout.base_vocab, layout.size))
    assert tokenizer.convert_tokens_to_ids(strings) == ids
    assert tokenizer.convert_ids_to_tokens(ids) == strings
    assert strings[layout.n_codes + 5] == "<|sid_1_5|>"
    assert strings[layout.soft_id - layout.base_vocab] == "<|soft|>"
    assert strings[layout.prompt_id - layout.base_vocab] == "<|prompt|>"
    assert len(tokenizer) == layout.size
    config = json.loads((whole / "model" / "config.json").read_text())
    assert config["vocab_size"] == layout.size + PADDING_ROWS


def test_splice_puts_each_vector_in_its_slot(whole: Path) -> None:
    export = Export.load(whole)
    layout, soft = export.layout, load_file(whole / "soft.safetensors")
    embedding = torch.randn(layout.size, 64)
    prompt = export.prompter.next_item([4, 9])
    found = export.splice(prompt, embedding)
    item = iter([(4, 0), (4, 1), (9, 0), (9, 1)])
    for at, token in enumerate(prompt.input_ids.tolist()):
        if token == layout.soft_id:
            row, k = next(item)
            expected = soft["items"][row, k]
        elif token == layout.prompt_id:
            expected = soft["prompt"][at]  # the soft prompt stands first: there is no begin token here
        else:
            expected = embedding[token]
        assert torch.equal(found[at], expected)
    assert next(item, None) is None
    ids = prompt.input_ids.tolist()
    assert ids[-5:-2] == layout.sid_tokens(export.codes[9]).tolist()


def test_an_exchanged_catalogue_is_refused(export_dir: Path, tmp_path: Path) -> None:
    other = make_export(tmp_path / "other", seed=1)
    shutil.copy(other / "items" / "catalog.parquet", export_dir / "items" / "catalog.parquet")
    with pytest.raises(ArtefactError, match=r"catalog\.parquet: not the catalogue.*genrec run.*export again"):
        Export.load(export_dir)


def test_an_unknown_format_is_refused(export_dir: Path) -> None:
    manifest = json.loads((export_dir / "manifest.json").read_text())
    manifest["result"]["format"] = 99
    (export_dir / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtefactError, match="export format 99, this version reads 10; export the run again"):
        Export.load(export_dir)


@pytest.mark.parametrize(
    "missing",
    ["manifest.json", "soft.safetensors", "items/catalog.parquet", "items/codes.npy", "items/popularity.npy"],
)
def test_half_an_export_is_refused(export_dir: Path, missing: str) -> None:
    (export_dir / missing).unlink()
    with pytest.raises(ArtefactError, match=missing.rpartition("/")[2].replace(".", r"\.")):
        Export.load(export_dir)


def test_a_cut_file_is_refused(export_dir: Path) -> None:
    path = export_dir / "soft.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtefactError, match=r"soft\.safetensors"):
        Export.load(export_dir)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"no manifest\.json"):
        Export.load(tmp_path)


def test_counts_that_differ_are_refused(export_dir: Path) -> None:
    codes = export_dir / "items" / "codes.npy"
    np.save(codes, np.load(codes)[:-1])
    with pytest.raises(ArtefactError, match="60 items, 59 ids and 60 soft tokens"):
        Export.load(export_dir)


def card(**changes) -> str:
    values = {
        "name": "demo",
        "base": "scratch:",
        "data_summary": {"items": 60, "odd | key": 3},
        "split": "leave_one_out",
        "metrics": None,
        "settings": {"seed": 0, "data": {"split": "leave_one_out"}},
    }
    return model_card(**values | changes)


@pytest.mark.parametrize(
    ("base", "named"),
    [
        ("scratch:", None),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("/data/models/mine", None),
        ("./mine", None),
        ("gpt2", "gpt2"),
    ],
)
def test_a_cards_front_matter_names_a_base_of_the_hub_only(base: str, named: str | None) -> None:
    _, front, body = card(base=base).split("---\n", 2)
    assert yaml.safe_load(front).get("base_model") == named
    assert yaml.safe_load(front)["library_name"] == "transformers"
    assert body.lstrip().startswith("# demo\n")


def test_a_card_shows_data_metrics_and_settings() -> None:
    value = {"mean": 0.25, "ci95": [0.2, 0.3]}
    metrics = {
        "data": "demo",
        "split": "leave_one_out",
        "users": 40,
        "models": {"genrec": {"ndcg@10": value}},
        "paired": {},
    }
    text = card(metrics=metrics)
    assert "| items | 60 |" in text
    assert r"| odd \| key | 3 |" in text
    assert "0.250 [0.200, 0.300]" in text
    assert "leave_one_out, 40 users" in text
    settings = text.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(settings) == {"seed": 0, "data": {"split": "leave_one_out"}}
    assert "Not evaluated yet" in card()
    assert "Not evaluated yet" not in text
