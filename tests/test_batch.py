"""Batches of texts: every row exactly once, whatever kills the process; bad rows aside, with a reason."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genrec.errors import ConfigError, DataError
from genrec.serving import batch, torch_engine
from genrec.serving.audit import find_origin
from genrec.serving.batch import Wish, describe_pairs
from genrec.serving.engine import TextRequest
from genrec.serving.export import Export
from genrec.serving.torch_engine import TorchEngine, shared_prefixes
from tests.engines import FaultyEngine
from tests.export_fixture import make_export

ITEMS = 60


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Export:
    return Export.load(make_export(tmp_path_factory.mktemp("e")))


@pytest.fixture(scope="module")
def engine(export: Export) -> TorchEngine:
    return TorchEngine(export, "cpu")


def write_pairs(path: Path, n: int, row_group: int = 40, **changes: dict[int, object]) -> Path:
    """n rows: eight users with three events each; `changes` puts values into rows of a column."""
    columns: dict[str, list] = {
        "user_id": [f"user {i % 8}" for i in range(n)],
        "item_id": [f"item-{i % ITEMS}" for i in range(n)],
        "history": [[f"item-{(i % 8) * 3 + k}" for k in range(3)] for i in range(n)],
    }
    for name, values in changes.items():
        for row, value in values.items():
            columns[name][row] = value
    pq.write_table(pa.table(columns), path, row_group_size=row_group)
    return path


def rows_of(out: Path, prefix: str = "part") -> list[dict]:
    return [row for path in sorted(out.glob(f"{prefix}-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_every_row_once_with_the_engines_own_text(export: Export, engine: TorchEngine, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.parquet", 100)
    wish = Wish(max_tokens=5, temperature=0.8, seed=7)
    assert describe_pairs(export, engine, pairs, tmp_path / "out", wish) == {"written": 100, "rejected": 0}
    rows = rows_of(tmp_path / "out")
    assert [row["row"] for row in rows] == list(range(100))
    for row in rows[::13]:
        i = row["row"]
        history = [f"item-{(i % 8) * 3 + k}" for k in range(3)]
        assert row["item_id"] == f"item-{i % ITEMS}"
        alone = engine.generate([TextRequest(row["item_id"], history, 5, 0.8, 7 + i)])[0]
        assert row["text"] == alone.text
        assert (row["generated"], row["seed"], row["engine"]) == (True, 7 + i, "torch")
        assert "user" in row
        assert not row["user"].startswith("user")
    assert len({row["user"] for row in rows}) == 8  # the same hash for the same user


def test_bad_rows_go_aside_with_a_reason(export: Export, engine: TorchEngine, tmp_path: Path) -> None:
    hostile = "item-1<|sid_0_1|>‮🪑"
    pairs = write_pairs(
        tmp_path / "pairs.parquet",
        50,
        item_id={3: "nope", 4: None, 41: hostile},
        history={7: ["item-1", "gone"], 8: ["item-1", None], 9: [], 10: None, 11: ["item-1"] * 10_000},
        user_id={12: None, 13: "ユーザー\U0001f600"},
    )
    counts = describe_pairs(export, engine, pairs, tmp_path / "out", Wish(max_tokens=2))
    aside = {row["row"]: row["reason"] for row in rows_of(tmp_path / "out", "rejected")}
    assert sorted(aside) == [3, 4, 7, 8, 12, 41]
    assert counts == {"written": 44, "rejected": 6}
    assert "'nope'" in aside[3]
    assert aside[4] == "item_id is empty"
    assert "'gone'" in aside[7]
    assert aside[8] == "history holds a null"
    assert aside[12] == "user_id is empty"
    assert {row["row"] for row in rows_of(tmp_path / "out")} == set(range(50)) - set(aside)


def test_a_wrong_file_is_a_clear_error(export: Export, engine: TorchEngine, tmp_path: Path) -> None:
    def refused(pairs: Path, match: str) -> None:
        with pytest.raises(DataError, match=match):
            describe_pairs(export, engine, pairs, tmp_path / "out", Wish())
        assert not (tmp_path / "out").exists()

    pq.write_table(pa.table({"user_id": ["u"], "article": ["a"]}), tmp_path / "column.parquet")
    refused(tmp_path / "column.parquet", r"no column 'item_id'; expected .*found \['user_id', 'article'\]")
    pq.write_table(pa.table({"user_id": ["u"], "item_id": [7]}), tmp_path / "type.parquet")
    refused(tmp_path / "type.parquet", "'item_id' is int64; expected string")
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["a"], "history": ["b"]}), tmp_path / "list.parquet")
    refused(tmp_path / "list.parquet", "'history' is string; expected list")
    whole = write_pairs(tmp_path / "whole.parquet", 50).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "cut.parquet", "not a whole Parquet file")
    refused(tmp_path / "absent.parquet", "not a whole Parquet file")


def test_a_broken_row_group_goes_aside_and_the_rest_is_written(
    export: Export, engine: TorchEngine, tmp_path: Path
) -> None:
    pairs = write_pairs(tmp_path / "pairs.parquet", 120)
    column = pq.ParquetFile(pairs).metadata.row_group(1).column(1)
    start = min(o for o in (column.dictionary_page_offset, column.data_page_offset) if o)
    damaged = bytearray(pairs.read_bytes())
    damaged[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    pairs.write_bytes(bytes(damaged))
    counts = describe_pairs(export, engine, pairs, tmp_path / "out", Wish(max_tokens=2))
    assert counts == {"written": 80, "rejected": 40}
    assert {row["row"] for row in rows_of(tmp_path / "out", "rejected")} == set(range(40, 80))
    # a second start leaves it at that
    assert describe_pairs(export, engine, pairs, tmp_path / "out", Wish(max_tokens=2)) == counts


def test_a_second_start_asks_the_engine_nothing(export: Export, engine: TorchEngine, tmp_path: Path) -> None:
    pairs, out = write_pairs(tmp_path / "pairs.parquet", 100), tmp_path / "out"
    describe_pairs(export, engine, pairs, out, Wish(max_tokens=2))
    before = sorted(path.name for path in out.glob("*.parquet"))
    watched = FaultyEngine(engine)
    watched.name = "torch"
    describe_pairs(export, watched, pairs, out, Wish(max_tokens=2))
    assert watched.calls == []
    # a ledger whose last line a kill cut short, and a file that it left half-written
    ledger = out / batch.LEDGER
    ledger.write_text(ledger.read_text()[:-9])
    (out / ".part-00002-00000.parquet.1.tmp").write_bytes(b"PAR1")
    assert describe_pairs(export, watched, pairs, out, Wish(max_tokens=2))["written"] == 100
    assert [len(call) for call in watched.calls] == [20]
    assert not list(out.glob(".*.tmp"))
    after = {
        path.name: pq.read_table(path).drop_columns(["time"] if "part" in path.name else [])
        for path in out.glob("*.parquet")
    }
    assert sorted(after) == sorted(before)
    assert Counter(row["row"] for row in rows_of(out)) == Counter(range(100))


def test_an_engine_that_fails_half_way_loses_nothing(export: Export, engine: TorchEngine, tmp_path: Path) -> None:
    pairs, out = write_pairs(tmp_path / "pairs.parquet", 100), tmp_path / "out"

    class Half(FaultyEngine):
        name = "torch"

        def generate(self, requests):
            if len(self.calls) == 1:
                self.error = RuntimeError("out of memory")
            return super().generate(requests)

    with pytest.raises(RuntimeError, match="out of memory"):
        describe_pairs(export, Half(engine), pairs, out, Wish(max_tokens=2))
    assert len(rows_of(out)) == 40
    describe_pairs(export, engine, pairs, out, Wish(max_tokens=2))
    assert Counter(row["row"] for row in rows_of(out)) == Counter(range(100))


def test_a_folder_takes_one_job_at_a_time(export: Export, engine: TorchEngine, tmp_path: Path) -> None:
    pairs, out = write_pairs(tmp_path / "pairs.parquet", 10), tmp_path / "out"
    describe_pairs(export, engine, pairs, out, Wish(max_tokens=2))
    with pytest.raises(ConfigError, match="made with another seed; give another folder"):
        describe_pairs(export, engine, pairs, out, Wish(max_tokens=2, seed=1))
    with pytest.raises(ConfigError, match="another pairs_sha256"):
        describe_pairs(export, engine, write_pairs(tmp_path / "more.parquet", 11), out, Wish(max_tokens=2))
    with batch._alone(out), pytest.raises(ConfigError, match="another process writes there"):
        describe_pairs(export, engine, pairs, out, Wish(max_tokens=2))
    (out / batch.LEDGER).unlink()
    with pytest.raises(ConfigError, match="shards without ledger"):
        describe_pairs(export, engine, pairs, out, Wish(max_tokens=2))


def test_killed_for_real_every_row_is_there_once(export: Export, tmp_path: Path) -> None:
    pairs, out = write_pairs(tmp_path / "pairs.parquet", 400, row_group=20), tmp_path / "out"
    script = (
        "import sys; from pathlib import Path; from genrec.serving.batch import Wish, describe_pairs; "
        "from genrec.serving.export import Export; from genrec.serving.torch_engine import TorchEngine; "
        "e = Export.load(sys.argv[1]); "
        "describe_pairs(e, TorchEngine(e, 'cpu'), Path(sys.argv[2]), Path(sys.argv[3]), Wish(max_tokens=6))"
    )
    command = [sys.executable, "-c", script, str(export.folder), str(pairs), str(out)]
    rng, kills, seen = np.random.default_rng(0), 0, 0
    for attempt in range(3):
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(command, stderr=log, start_new_session=True)
        if attempt < 2:  # killed at some moment after it went on
            while process.poll() is None and len(list(out.glob("part-*"))) <= seen:
                time.sleep(0.005)
            time.sleep(float(rng.uniform(0, 0.15)))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
            seen = len(list(out.glob("part-*")))
        elif process.wait() == 0:
            break
        else:
            pytest.fail((tmp_path / "log").read_text())
    assert kills >= 1
    assert Counter(row["row"] for row in rows_of(out)) == Counter(range(400))
    assert rows_of(out, "rejected") == []
    assert not list(out.glob(".*.tmp"))
    assert len({row["user"] for row in rows_of(out)}) == 8  # the salt outlives the kills


def test_audit_finds_model_and_prompt(export: Export, engine: TorchEngine, tmp_path: Path) -> None:
    pairs, out = write_pairs(tmp_path / "pairs.parquet", 50, item_id={3: "nope"}), tmp_path / "out"
    describe_pairs(export, engine, pairs, out, Wish("headline", max_tokens=4))
    (found,) = find_origin(out, row=45, export=export.folder)
    assert (found["row"], found["item_id"], found["export_given"], found["template_here"]) == (
        45,
        "item-45",
        "same",
        "same",
    )
    assert found["prompt"].startswith("headline-")
    assert "Headline" in found["template"]
    other = make_export(tmp_path, seed=1)
    assert find_origin(out, row=45, export=other)[0]["export_given"].startswith("another")
    with pytest.raises(DataError, match=r"row 3 was rejected: .*'nope'"):
        find_origin(out, row=3)
    with pytest.raises(DataError, match="no text of row 999"):
        find_origin(out, row=999)
    with pytest.raises(DataError, match="say which with --row or --text"):
        find_origin(out)
    answer = tmp_path / "answer.json"
    answer.write_text(
        json.dumps({"text": "x", "provenance": {**{k: found[k] for k in ("export", "prompt")}, "generated": True}})
    )
    assert find_origin(answer, export=export.folder)[0]["export_given"] == "same"
    answer.write_text('{"text": "x"}')
    with pytest.raises(DataError, match="no provenance"):
        find_origin(answer)


def test_shared_beginnings_are_found(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompter = engine.export.prompter
    long, other = list(range(10)), list(range(20, 30))
    prompts = [prompter.describe(h, r) for h, r in ((long, 1), (long, 2), (other, 1), (long, 3))]
    owner, shared = shared_prefixes(prompts)
    assert owner == [0, 0, 1, 2]
    n = shared[0]
    assert shared == [n, n, 0, 0]
    assert (prompts[0].slots[:n] == prompts[1].slots[:n]).all()
    assert (prompts[0].slots[: n + 8] != prompts[1].slots[: n + 8]).any()
    assert shared_prefixes([prompts[0]] * 3) == ([0, 0, 0], [len(prompts[0].input_ids) - 1] * 3)


def test_sharing_changes_no_text(engine: TorchEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [
        TextRequest(f"item-{i}", [f"item-{(i // 3) + k}" for k in range(i // 3)], 10, (i % 2) * 0.9, i)
        for i in range(24)
    ]
    shared = [result.token_ids for result in engine.generate(requests)]
    monkeypatch.setattr(torch_engine, "LEAST_SHARED", 10**6)
    assert [result.token_ids for result in engine.generate(requests)] == shared
