"""Stages: keys, skipping, atomic results, and what a full disk or a kill leaves behind."""

import errno
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from genrec.artefacts import MANIFEST, file_hash, key_at, key_of, read_manifest, run_stage, write_json, write_text
from genrec.errors import ArtefactError, DataError


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def stage(folder, text="a", fail=None, settings=None, force=False):
    def build(out):
        (out / "value.txt").write_text(text)
        if fail is not None:
            raise fail
        return {"text": text}

    return run_stage(folder, "stage", settings or {"x": 1}, {"in": "k"}, build, force)


def test_a_stage_is_skipped_until_something_changes(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    target = stage(tmp_path)
    manifest = read_manifest(target)
    assert manifest["result"] == {"text": "a"}
    assert manifest["settings"] == {"x": 1}
    assert manifest["versions"]["torch"] == torch.__version__
    assert key_at(target) == key_of({"inputs": {"in": "k"}, "settings": {"x": 1}, "stage": "stage"})
    stage(tmp_path, "b")
    assert (target / "value.txt").read_text() == "a"
    assert "stage: unchanged, skipped" in caplog.text
    stage(tmp_path, "b", settings={"x": 2})
    assert (target / "value.txt").read_text() == "b"
    stage(tmp_path, "c", settings={"x": 2}, force=True)
    assert (target / "value.txt").read_text() == "c"
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "raised", "match"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ArtefactError, r"stage: cannot be written \(No space left"),
        (OSError("1000 requested and 0 written"), ArtefactError, r"1000 requested and 0 written\); the last whole"),
        (PermissionError(errno.EACCES, "Permission denied"), ArtefactError, "Permission denied.*fix the permissions"),
        (SafetensorError("Error while serializing: No space left on device (os error 28)"), ArtefactError, "No space"),
        (Exception("No space left on device (os error 28)"), ArtefactError, "No space left"),
        (FileNotFoundError(errno.ENOENT, "No such file", "model.bin"), FileNotFoundError, "model.bin"),
        (RuntimeError("shapes differ"), RuntimeError, "^shapes differ$"),
        (DataError("row 3 is bad"), DataError, "^row 3 is bad$"),
    ],
)
def test_a_failed_stage_leaves_the_last_whole_artefact(tmp_path, error, raised, match):
    target = stage(tmp_path)
    with pytest.raises(raised, match=match):
        stage(tmp_path, "b", error, {"x": 2})
    assert (target / "value.txt").read_text() == "a"
    assert read_manifest(target)["settings"] == {"x": 1}
    assert hidden(tmp_path) == []
    stage(tmp_path, "b", settings={"x": 2})
    assert (target / "value.txt").read_text() == "b"


def test_a_library_that_hides_the_cause_is_seen_through_when_the_disk_is_full(tmp_path, monkeypatch):
    hides = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5))
    with pytest.raises(ArtefactError, match="No space left on device"):
        stage(tmp_path, fail=hides)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    with pytest.raises(RuntimeError, match="unexpected pos"):
        stage(tmp_path, fail=hides)


def test_a_kill_between_the_two_renames_is_mended(tmp_path):
    target = stage(tmp_path)
    target.rename(tmp_path / ".stage.old")
    (tmp_path / ".stage.part").mkdir()
    (tmp_path / ".stage.part" / "half").write_text("x")
    assert stage(tmp_path, "b") == target
    assert (target / "value.txt").read_text() == "a"
    stage(tmp_path, "b", settings={"x": 2})
    assert sorted(p.name for p in target.iterdir()) == [MANIFEST, "value.txt"]
    assert hidden(tmp_path) == []


def test_what_is_no_artefact_says_what_to_do(tmp_path):
    with pytest.raises(ArtefactError, match=r"no manifest\.json there.*run the stage that writes it"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ArtefactError, match=r"not valid JSON.*delete .* and run again"):
        read_manifest(tmp_path)
    with pytest.raises(ArtefactError, match=r"nothing: cannot be read \(No such file"):
        file_hash(tmp_path / "nothing")


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_json(tmp_path / "new" / "a.json", {"b": "é", "a": [1]})
    assert json.loads((tmp_path / "new" / "a.json").read_text(encoding="utf-8")) == {"b": "é", "a": [1]}

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ArtefactError, match=r"a\.json: cannot be written \(No space left on device\)"):
        write_json(tmp_path / "new" / "a.json", {})
    assert "é" in (tmp_path / "new" / "a.json").read_text(encoding="utf-8")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.json"]
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match=r"x\.txt: cannot be written \((Not a directory|File exists)\)"):
        write_text(tmp_path / "file" / "x.txt", "")


def test_keys_do_not_depend_on_order():
    assert key_of({"a": 1, "b": [1, 2]}) == key_of({"b": [1, 2], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})
    assert key_of([1, 2]) != key_of([2, 1])


@pytest.mark.parametrize("library", ["safetensors", "numpy", "torch", "parquet"])
def test_a_really_full_disk(tiny_disk, library):
    """Each library that writes artefacts, on a disk of two megabytes."""
    stage(tiny_disk)

    def build(out):
        if library == "safetensors":
            save_file({"x": torch.ones(1 << 20)}, out / "x.safetensors")
        elif library == "numpy":
            np.save(out / "x.npy", np.ones(1 << 20))
        elif library == "torch":
            torch.save(torch.ones(1 << 20), out / "x.pt")
        else:
            import pyarrow as pa
            import pyarrow.parquet as pq

            table = pa.table({"x": np.random.default_rng(0).random(1 << 20)})
            pq.write_table(table, out / "x.parquet")

    with pytest.raises(ArtefactError, match=r"stage: cannot be written \(.+\); the last whole artefact is untouched"):
        run_stage(tiny_disk, "stage", {"x": 2}, {}, build)
    assert hidden(tiny_disk) == []
    assert stage(tiny_disk) == tiny_disk / "stage"
