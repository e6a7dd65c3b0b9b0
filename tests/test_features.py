"""The second exit: aligned item vectors in a Parquet file, without the language model."""

import re
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from genrec.config import resolve_recipe
from genrec.errors import ArtefactError
from genrec.features import write_features
from genrec.pipeline import Run
from tests.conftest import tiny_recipe


def test_the_vectors_are_the_adapters_and_no_language_model_is_needed(prepared, tmp_path, monkeypatch):
    expected = prepared.space.backbone(tuned=False).eval().all_soft_tokens(60)
    folder = tmp_path / "run"
    shutil.copytree(prepared.folder, folder)
    shutil.rmtree(folder / "base")

    def no_model(*_, **__):
        raise AssertionError("a language model was loaded")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", no_model)
    monkeypatch.setattr("genrec.workspace.load_base", no_model)
    out = tmp_path / "new" / "features.parquet"
    said = write_features(folder, out)
    assert said == "60 items, 128 values each"
    table = pq.read_table(out)
    assert table["item_id"].to_pylist() == prepared.space.catalogue.item_ids
    vectors = np.array(table["vector"].to_pylist(), np.float32)
    np.testing.assert_allclose(vectors, expected.flatten(1).numpy(), rtol=1e-5, atol=1e-7)
    assert len(np.unique(vectors.round(6), axis=0)) > 50


def test_a_run_without_alignment_says_what_to_do(prepared, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(prepared.folder, folder)
    Run(folder, resolve_recipe(tiny_recipe(align={"steps": 0})), folder).align()
    with pytest.raises(ArtefactError, match=r"aligned\.safetensors: not there; run the recipe with align\.steps above"):
        write_features(folder, tmp_path / "x.parquet")
    with pytest.raises(ArtefactError, match=r"no recipe\.yaml there"):
        write_features(tmp_path, tmp_path / "x.parquet")


def test_a_file_that_cannot_be_written(prepared, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match=r"x\.parquet: cannot be written") as error:
        write_features(prepared.folder, tmp_path / "file" / "x.parquet")
    assert re.search("Not a directory|File exists", str(error.value))
