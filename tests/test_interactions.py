import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from genrec.catalog import Catalogue
from genrec.errors import ArtefactError, DataError
from genrec.interactions import Log, read_log

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def catalogue_of(item_ids):
    n = len(item_ids)
    return Catalogue(
        item_ids=list(item_ids),
        titles=[""] * n,
        descriptions=[""] * n,
        categories=[[]] * n,
        attributes=[{}] * n,
        prices=np.full(n, np.nan, np.float32),
        images=[None] * n,
        available=np.ones(n, bool),
    )


def write(folder, rows):
    path = folder / "log.jsonl"
    path.write_text(
        "".join(json.dumps(dict(zip(("user_id", "item_id", "timestamp"), r, strict=True))) + "\n" for r in rows)
    )
    return path


def histories(log):
    return {user: log.history(row).tolist() for row, user in enumerate(log.user_ids)}


def test_events_are_sorted_by_user_time_and_row(tmp_path):
    rows = [("v", "b", 5), ("u", "c", 2), ("u", "a", 1), ("v", "a", 5), ("u", "b", 2), ("w", "a", 0)]
    log, bad = read_log(write(tmp_path, rows), {}, catalogue_of("abc"), max_bad_share=0)
    assert histories(log) == {"v": [1, 0], "u": [0, 2, 1], "w": [0]}
    assert log.times.tolist() == [5, 5, 1, 2, 2, 0]
    assert (log.items.dtype, log.offsets.dtype, log.times.dtype) == (np.int32, np.int64, np.float64)
    assert not bad.rows


def test_against_a_plain_loop(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(f"u{u}", f"i{i}", int(t)) for u, i, t in rng.integers(0, [30, 24, 40], (3000, 3))]
    log, bad = read_log(write(tmp_path, rows), {}, catalogue_of([f"i{i}" for i in range(20)]), max_bad_share=1)
    seen: set[tuple[str, str, int]] = set()
    wanted: dict[str, list[tuple[int, int, int]]] = {}
    n_unknown = 0
    for row, (user, item, when) in enumerate(rows):
        wanted.setdefault(user, [])
        if int(item[1:]) >= 20:
            n_unknown += 1
        elif (user, item, when) not in seen:
            seen.add((user, item, when))
            wanted[user].append((when, row, int(item[1:])))
    assert histories(log) == {user: [item for *_, item in sorted(events)] for user, events in wanted.items()}
    assert list(wanted) == log.user_ids
    assert bad.counts == {
        "item not in the catalogue": n_unknown,
        "duplicate event": len(rows) - n_unknown - len(seen),
    }


def test_ids_match_across_types_and_columns_can_be_mapped(tmp_path):
    table = pa.table({"customer": [1.0, 1.0, 2.0], "sku": [7, 8, 7], "when": [3, 2, 1], "weight": [1, 1, 1]})
    pa.parquet.write_table(table, tmp_path / "log.parquet")
    columns = {"user_id": "customer", "item_id": "sku", "timestamp": "when"}
    log, _ = read_log(tmp_path / "log.parquet", columns, catalogue_of(["7", "8"]), max_bad_share=0)
    assert histories(log) == {"1": [1, 0], "2": [0]}
    with pytest.raises(DataError, match=r"unknown fields \['user'\]"):
        read_log(tmp_path / "log.parquet", {"user": "customer"}, catalogue_of(["7"]), max_bad_share=0)


@pytest.mark.parametrize(
    ("stamps", "seconds"),
    [
        (["1970-01-01", "1970-01-02T00:00:01Z", "1970-01-01 01:00:00+01:00"], [0, 86_401, 0]),
        (["1.5", "2", "1970-01-01T00:00:03"], [1.5, 2, 3]),
        ([1.5, 2, 3], [1.5, 2, 3]),
    ],
)
def test_timestamps(tmp_path, stamps, seconds):
    rows = [(f"u{i}", "a", stamp) for i, stamp in enumerate(stamps)]
    log, _ = read_log(write(tmp_path, rows), {}, catalogue_of("a"), max_bad_share=0)
    assert log.times.tolist() == seconds


@pytest.mark.parametrize("kind", [pa.timestamp("ms"), pa.timestamp("ns", "Europe/Paris"), pa.date32()])
def test_arrow_times_are_seconds(tmp_path, kind):
    day = 20_000 if kind == pa.date32() else 20_000 * 86_400 * (1000 if kind.unit == "ms" else 10**9)
    table = pa.table({"user_id": ["u"], "item_id": ["a"], "timestamp": pa.array([day], kind)})
    pa.parquet.write_table(table, tmp_path / "log.parquet")
    log, _ = read_log(tmp_path / "log.parquet", {}, catalogue_of("a"), max_bad_share=0)
    assert log.times.tolist() == [20_000 * 86_400]


BAD = [
    (("u", "a", 1), "duplicate event"),
    ((None, "a", 1), "no user_id"),
    (("u", "", 1), "no item_id"),
    (("u", "z", 1), "item not in the catalogue"),
    (("u", "a", None), "no timestamp"),
    (("u", "a", "soon"), "timestamp is neither a number nor an ISO date"),
]


def test_bad_events_go_to_quarantine_with_a_reason(tmp_path):
    path = write(tmp_path, [("u", "a", 1), *(row for row, _ in BAD), ("u", "a", 2)])
    log, bad = read_log(path, {}, catalogue_of("ab"), max_bad_share=0.75)
    assert histories(log) == {"u": [0, 0]}
    assert bad.rows == [2, 3, 4, 5, 6, 7]
    assert bad.reasons == [reason for _, reason in BAD]
    assert json.loads(bad.raw[3])["item_id"] == "z"
    with pytest.raises(DataError, match=r"log\.jsonl: 6 of 8 rows are bad \(75\.0%.*'no user_id': 1.*row 2 \(dup"):
        read_log(path, {}, catalogue_of("ab"), max_bad_share=0.74)


def test_missing_columns_and_empty_logs(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("user_id,item_id\nu,a\n")
    with pytest.raises(DataError, match=r"no timestamp column \(the order.*\['user_id', 'item_id'\].*init"):
        read_log(path, {}, catalogue_of("a"), max_bad_share=0)
    path.write_text("user_id,item_id,timestamp\n")
    with pytest.raises(DataError, match="the log is empty"):
        read_log(path, {}, catalogue_of("a"), max_bad_share=0)
    path.write_text("user_id,item_id,timestamp\nu,b,1\n")
    with pytest.raises(DataError, match=r"none of the 1 rows is usable: \{'item not in the catalogue': 1\}"):
        read_log(path, {}, catalogue_of("a"), max_bad_share=1)


def test_save_and_load_round_trip(tmp_path):
    rows = [("v", "b", 5.25), ("u", "c", 2), ("u", "a", 1), ("é", "a", 0)]
    log, _ = read_log(write(tmp_path, rows), {}, catalogue_of("abc"), max_bad_share=0)
    log.save(tmp_path / "out")
    loaded = Log.load(tmp_path / "out")
    assert loaded.user_ids == log.user_ids
    for name in ("offsets", "items", "times"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(log, name), strict=True)
    with pytest.raises(ArtefactError, match=r"log\.parquet: no log there"):
        Log.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "n_users", "n_events"),
    [("amazon-scientific", 8442, 59_427), ("movielens-1m-posters", 6040, 987_531)],
)
def test_real_logs_are_read_as_they_are_and_fast(name, n_users, n_events):
    folder = DATA / name
    if not folder.exists():
        pytest.skip(f"{folder} is not on this machine")
    ids = [json.loads(line)["item_id"] for line in (folder / "items.jsonl").read_text().splitlines()]
    started = time.monotonic()
    log, bad = read_log(folder / "interactions.parquet", {}, catalogue_of(ids), max_bad_share=0)
    assert time.monotonic() - started < 15  # 0.7 s alone on two cores; a loop over the events takes longer
    assert (len(log.user_ids), len(log.items), len(bad.rows)) == (n_users, n_events, 0)
    for user in range(0, n_users, 997):
        np.testing.assert_array_equal(np.diff(log.times[log.offsets[user] : log.offsets[user + 1]]) > 0, True)
