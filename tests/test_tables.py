import json

import pyarrow as pa
import pyarrow.parquet
import pytest

from genrec.errors import DataError
from genrec.tables import read_table, text_column

ROWS = [{"id": "007", "n": 1, "x": 0.5}, {"id": "8", "n": 2, "x": None}, {"id": "ü\nz", "n": None, "x": 2.0}]


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def test_jsonl_and_parquet_agree(tmp_path):
    lines = write_jsonl(tmp_path / "a.jsonl", ROWS)
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read_table(lines, {}).to_pylist() == read_table(tmp_path / "a.parquet", {}).to_pylist() == ROWS


def test_csv_stays_text_and_keeps_zeros_quotes_and_newlines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('\ufeffid,title\n007,"a, ""b""\nc"\n8,\n', encoding="utf-8")
    assert read_table(path, {}).to_pylist() == [
        {"id": "007", "title": 'a, "b"\nc'},
        {"id": "8", "title": None},
    ]


def test_mapping_moves_columns_and_takes_the_name(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"item_id": "0", "asin": "B0", "title": "t"}])
    assert read_table(path, {"item_id": "asin"}).to_pylist() == [{"item_id": "B0", "title": "t"}]
    assert read_table(path, {"asin": "item_id", "item_id": "asin"}).to_pylist() == [
        {"asin": "0", "item_id": "B0", "title": "t"}
    ]


def test_unknown_column_names_file_column_and_what_is_there(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match=r"a\.jsonl: no column 'sku' \(mapped to 'item_id'\).*\['id', 'n', 'x'\]"):
        read_table(path, {"item_id": "sku"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": "3", "tit', r"a\.jsonl, line 3: not valid JSON"),
        (b"[1, 2]", r"a\.jsonl, line 3: expected one JSON object a line, found a list"),
        (b'{"id": "\xff"}', r"a\.jsonl, line 3: not valid JSON .*utf-8"),
        (b"[" * 100_000, r"a\.jsonl, line 3: not valid JSON"),
    ],
)
def test_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": "1"}\n{"id": "2"}\n' + line)
    with pytest.raises(DataError, match=message):
        read_table(path, {})


def test_mixed_types_become_text_and_keys_may_come_late(tmp_path):
    rows = [{"a": 1}, {"a": "x", "o": {"k": [1]}}, {"a": True}, {"a": 10**30, "f": 1}, {"f": 2.5}]
    rows += [{"o": {"other": None}, "l": ["p", "q"]}]
    assert read_table(write_jsonl(tmp_path / "a.jsonl", rows), {}).to_pydict() == {
        "a": ["1", "x", "true", str(10**30), None, None],
        "o": [None, '{"k": [1]}', None, None, None, '{"other": null}'],
        "f": [None, None, None, 1.0, 2.5, None],
        "l": [None, None, None, None, None, ["p", "q"]],
    }


def test_types_that_differ_between_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("genrec.tables._CHUNK_ROWS", 2)
    rows = [{"a": 1, "b": 1}, {}, {"a": 1.5, "b": "x"}, {"c": ["z"]}, {"a": 3, "b": 2}, {"late": "y"}]
    assert read_table(write_jsonl(tmp_path / "a.jsonl", rows), {}).to_pydict() == {
        "a": [1.0, None, 1.5, None, 3.0, None],
        "b": ["1", None, "x", None, "2", None],
        "c": [None, None, None, ["z"], None, None],
        "late": [None, None, None, None, None, "y"],
    }


def test_half_surrogates_do_not_stop_a_run(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"t": "a\\ud800b", "l": ["\\udfff"]}\n')
    assert read_table(path, {}).to_pylist() == [{"t": "a?b", "l": ["?"]}]


def test_same_id_whatever_its_type():
    for values in (["7", None, "12"], [7, None, 12], [7.0, None, 12.0]):
        assert text_column(pa.chunked_array([values])).to_pylist() == ["7", None, "12"]
    assert text_column(pa.chunked_array([["", " ", "a "]])).to_pylist() == [None, None, "a "]
    assert text_column(pa.chunked_array([[7.5, float("nan")]])).to_pylist() == ["7.5", None]
    assert text_column(pa.chunked_array([pa.array(["a", "b"]).dictionary_encode()])).to_pylist() == ["a", "b"]
    assert text_column(pa.chunked_array([pa.nulls(2)])).to_pylist() == [None, None]
    with pytest.raises(DataError, match=r"ids are stored as list.*expected text or whole numbers"):
        text_column(pa.chunked_array([[[1]]]))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"a\.xlsx: unknown file type '.xlsx'; expected one of .*'\.csv'"):
        read_table(tmp_path / "a.xlsx", {})
    with pytest.raises(DataError, match=r"none\.parquet: cannot be read"):
        read_table(tmp_path / "none.parquet", {})
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no end")
    with pytest.raises(DataError, match=r"cut\.parquet: not a whole \.parquet file"):
        read_table(tmp_path / "cut.parquet", {})
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match=r"empty\.csv: empty file; expected a header line"):
        read_table(tmp_path / "empty.csv", {})
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(DataError, match=r"ragged\.csv: not a whole \.csv file .*Expected 2 columns, got 1"):
        read_table(tmp_path / "ragged.csv", {})
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    with pytest.raises(DataError, match=r"twice\.csv: two columns share a name in \['a', 'a'\]"):
        read_table(tmp_path / "twice.csv", {})
    (tmp_path / "empty.jsonl").write_text("\n")
    assert read_table(tmp_path / "empty.jsonl", {}).num_rows == 0
