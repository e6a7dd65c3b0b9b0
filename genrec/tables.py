"""JSONL, CSV and Parquet files as Arrow tables whose columns carry our field names."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from genrec.errors import DataError

_CHUNK_ROWS = 65_536
_STRINGS = pa.list_(pa.string())


def read_table(path: Path, columns: dict[str, str]) -> pa.Table:
    """Read a table and rename its columns.

    CSV columns stay text, so that an id such as ``007`` keeps its zeros. In JSONL, lists of strings become
    lists; objects and columns of mixed types become JSON text.

    Args:
        path: a ``.jsonl`` or ``.json`` (one object a line), ``.csv`` or ``.parquet`` file.
        columns: our field -> their column. A mapped column is found under our field's name only;
            columns that are not mapped keep their name, unless a mapped field takes it.

    Raises:
        DataError: the file is missing, unreadable or damaged (JSONL: the line is named), or lacks a mapped
            column.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path}: unknown file type {path.suffix!r}; expected one of {sorted(_READERS)}")
    try:
        table = reader(path)
    except OSError as err:
        raise DataError(f"{path}: cannot be read ({err}); check the path and that the file is whole") from err
    except pa.ArrowInvalid as err:
        raise DataError(f"{path}: not a whole {path.suffix} file ({err}); write it again") from err
    if len(set(table.column_names)) != len(table.column_names):
        raise DataError(f"{path}: two columns share a name in {table.column_names}; rename one")
    for field, column in columns.items():
        if column not in table.column_names:
            raise DataError(
                f"{path}: no column {column!r} (mapped to {field!r}); the columns there are {table.column_names}"
            )
    taken = {*columns, *columns.values()}
    named = {field: table[column] for field, column in columns.items()}
    named |= {column: table[column] for column in table.column_names if column not in taken}
    return pa.table(named)


def text_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Ids as text, whatever type they were stored in: 7, 7.0 and "7" are the same id; empty text is null.

    Raises:
        DataError: the column holds lists, objects or undecodable bytes.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):  # integers with gaps, as pandas writes them
        column = pc.if_else(pc.is_finite(column), column, None)
        whole = pc.and_(pc.equal(column, pc.floor(column)), pc.less(pc.abs(column), 2.0**53))
        if pc.all(whole).as_py() is not False:
            column = column.cast(pa.int64())
    try:
        column = column.cast(pa.string())
    except pa.ArrowException as err:
        raise DataError(f"ids are stored as {column.type}; expected text or whole numbers ({err})") from err
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(column), ""), None, column)


def _read_parquet(path: Path) -> pa.Table:
    return pa.parquet.read_table(path)


def _read_csv(path: Path) -> pa.Table:
    newlines = pa.csv.ParseOptions(newlines_in_values=True)
    try:
        header = pa.csv.open_csv(path, parse_options=newlines).schema.names
    except pa.ArrowInvalid as err:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: empty file; expected a header line and rows") from err
        raise
    convert = pa.csv.ConvertOptions(
        column_types={name: pa.string() for name in header}, strings_can_be_null=True, null_values=[""]
    )
    return pa.csv.read_csv(path, parse_options=newlines, convert_options=convert)


def _read_jsonl(path: Path) -> pa.Table:
    chunks: dict[str, list[pa.Array]] = {}
    n_rows = 0
    with path.open("rb") as handle:
        rows = _objects(path, handle)
        while chunk := list(islice(rows, _CHUNK_ROWS)):
            for name in {key: None for row in chunk for key in row}:
                values = chunks.setdefault(name, [pa.nulls(n_rows)] if n_rows else [])
                values.append(_array([row.get(name) for row in chunk]))
            n_rows += len(chunk)
            for values in chunks.values():
                missing = n_rows - sum(map(len, values))
                if missing:
                    values.append(pa.nulls(missing))
    return pa.table({name: _unify(values) for name, values in chunks.items()})


def _objects(path: Path, lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    loads = json.JSONDecoder().decode
    for number, line in enumerate(lines, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            text = line.decode().strip()
            row = loads(text) if text else None
        except (ValueError, RecursionError) as err:
            raise DataError(
                f"{path}, line {number}: not valid JSON ({err}); the file may be cut short: write it again"
            ) from err
        if isinstance(row, dict):
            yield row
        elif text:
            raise DataError(f"{path}, line {number}: expected one JSON object a line, found a {type(row).__name__}")


def _array(values: list[Any]) -> pa.Array:
    kinds = {type(value) for value in values} - {type(None)}
    if kinds == {int, float}:
        kinds = {float}
    if kinds == {list} and all(isinstance(part, str) for value in values if value for part in value):
        return _typed(values, _STRINGS)
    if kinds <= {str} or kinds in ({int}, {float}, {bool}):
        return _typed(values, None)
    return _typed([_as_text(value) for value in values], None)


def _typed(values: list[Any], kind: pa.DataType | None) -> pa.Array:
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell and UTF-8 cannot
        return pa.array([_whole(value) for value in values], kind)
    except (pa.ArrowInvalid, OverflowError):  # an integer beyond 64 bits
        return pa.array([_as_text(value) for value in values])


def _whole(value: Any) -> Any:
    if isinstance(value, list):
        return [_whole(part) for part in value]
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    return json.dumps(value, ensure_ascii=True)


def _unify(chunks: list[pa.Array]) -> pa.ChunkedArray:
    kinds = {chunk.type for chunk in chunks} - {pa.null()}
    if kinds == {pa.int64(), pa.float64()}:
        kinds = {pa.float64()}
    if not kinds:
        kinds = {pa.string()}
    if len(kinds) == 1:
        kind = kinds.pop()
        return pa.chunked_array([chunk.cast(kind) for chunk in chunks])
    return pa.chunked_array(
        [pa.array([_as_text(value) for value in chunk.to_pylist()], pa.string()) for chunk in chunks]
    )


_READERS = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
