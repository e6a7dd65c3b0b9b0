"""Texts for many (user, item) pairs: from a Parquet file to Parquet shards, each row exactly once, whatever kills it.

The file is read one row group at a time and worked on in *chunks* of at most `CHUNK_ROWS` rows. A chunk's texts are one
shard and its bad rows one side file, both named after the chunk and renamed into place whole; then a line in the ledger
says that the chunk is done. A second start skips what the ledger holds and writes the rest again under the same names,
so nothing is lost or doubled. Memory is that of one chunk.

    out/part-00000-00000.parquet      row, user, item_id, text, finish_reason and provenance
    out/rejected-00000-00000.parquet  row, reason
    out/ledger.jsonl                  first what is written here, then a line per finished chunk
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from genrec.artefacts import file_hash
from genrec.errors import ArtefactError, ConfigError, DataError
from genrec.prompts import prompt_version, source
from genrec.serving.engine import Engine, TextRequest
from genrec.serving.export import Export
from genrec.serving.provenance import provenance_of
from genrec.serving.resolve import max_positions, text_prompt
from genrec.serving.user_hash import UserHash, salt_of_environment
from genrec.writer import DEFAULT_STYLE

log = logging.getLogger(__name__)
CHUNK_ROWS = 1024
MAX_HISTORY = 500  # newest events of a row's history
LEDGER, LOCK, SALT = "ledger.jsonl", ".lock", ".salt"
COLUMNS = {"item_id": pa.string(), "user_id": pa.string(), "history": pa.list_(pa.string()), "style": pa.string()}
REQUIRED = ("item_id", "user_id")
SHARD = pa.schema(
    {
        "row": pa.int64(),
        "user": pa.string(),
        "item_id": pa.string(),
        "text": pa.string(),
        "finish_reason": pa.string(),
        "generated": pa.bool_(),
        "model": pa.string(),
        "export": pa.string(),
        "genrec": pa.string(),
        "engine": pa.string(),
        "prompt": pa.string(),
        "style": pa.string(),
        "temperature": pa.float64(),
        "seed": pa.int64(),
        "time": pa.string(),
    }
)
REJECTED = pa.schema({"row": pa.int64(), "reason": pa.string()})


@dataclass(frozen=True)
class Wish:
    """What is wanted of every row."""

    task: str = "describe"
    max_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0  # row r is written with seed + r


@dataclass(frozen=True)
class Chunk:
    """Some neighbouring rows of the file; `table` is None where the file does not yield them."""

    name: str
    first_row: int
    rows: int
    table: pa.Table | None
    problem: str = ""


def describe_pairs(export: Export, engine: Engine, pairs: Path, out: Path, wish: Wish) -> dict[str, int]:
    """Write a text for every row of `pairs`; goes on where an earlier, killed call stopped.

    Args:
        export: the engine's export.
        engine: writes.
        pairs: Parquet with `user_id`, `item_id` and, where there are any, `history` (list of item ids, oldest first)
            and `style`.
        out: folder of the shards.
        wish: the same for every row.

    Returns:
        {"written", "rejected"}: rows in all shards and side files.

    Raises:
        DataError: `pairs` is no Parquet file or lacks a column.
        ConfigError: `out` holds texts of something else, or another process writes there.
        ArtefactError: the disk is full or `out` is read-only.
    """
    file = open_pairs(pairs)
    header = {
        "pairs_sha256": file_hash(pairs),
        "export": str(export.manifest["key"]),
        "engine": engine.name,
        "prompt": prompt_version(wish.task),
        "template": source(wish.task),
        "chunk_rows": CHUNK_ROWS,
        **vars(wish),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _alone(out):
            for stale in out.glob(".*.tmp"):
                stale.unlink()
            done = open_ledger(out, header)
            hashed = UserHash(_salt(out))
            counts = {"written": sum(d["written"] for d in done.values()),
                      "rejected": sum(d["rejected"] for d in done.values())}  # fmt: skip
            with tqdm(total=file.metadata.num_rows, unit="row", desc=wish.task, disable=None, smoothing=0.1) as bar:
                bar.update(sum(counts.values()))
                for chunk in chunks(file, set(done)):
                    found = _write_chunk(export, engine, chunk, out, wish, hashed)
                    _append(out, found)
                    counts = {name: counts[name] + found[name] for name in counts}
                    bar.update(chunk.rows)
    except OSError as err:
        raise ArtefactError(
            f"{out}: cannot be written ({err.strerror or err}); free some space or fix the permissions, then run the "
            "same command again: finished rows stay"
        ) from err
    return counts


def open_pairs(pairs: Path) -> pq.ParquetFile:
    """The file of pairs, its columns checked.

    Raises:
        DataError: it cannot be read, or a column is missing or of another type.
    """
    try:
        file = pq.ParquetFile(pairs, memory_map=True, pre_buffer=False)
    except (OSError, pa.ArrowException) as err:
        raise DataError(f"{pairs}: not a whole Parquet file ({err}); write it again") from err
    schema = file.schema_arrow
    if missing := [name for name in REQUIRED if name not in schema.names]:
        raise DataError(f"{pairs}: no column {missing[0]!r}; expected {', '.join(COLUMNS)}, found {schema.names}")
    for name, kind in COLUMNS.items():
        if name not in schema.names:
            continue
        found = schema.field(name).type
        text = pa.types.is_list(found) or pa.types.is_large_list(found) if name == "history" else True
        inner = found.value_type if name == "history" and text else found
        if not (text and (pa.types.is_string(inner) or pa.types.is_large_string(inner))):
            raise DataError(f"{pairs}: column {name!r} is {found}; expected {kind}")
    return file


def chunks(file: pq.ParquetFile, done: set[str]) -> Iterator[Chunk]:
    """The file's rows in chunks that are not done; a row group that is done is not read, a broken one is one chunk."""
    names = [name for name in COLUMNS if name in file.schema_arrow.names]
    first = 0
    for group in range(file.num_row_groups):
        rows = file.metadata.row_group(group).num_rows
        starts = range(0, rows, CHUNK_ROWS)
        wanted = [f"{group:05d}-{part:05d}" for part in range(len(starts))]
        rest = f"{group:05d}-rest"
        if rest not in done and not done.issuperset(wanted):
            part = 0
            try:
                for batch in file.iter_batches(CHUNK_ROWS, row_groups=[group], columns=names, use_threads=False):
                    if wanted[part] not in done:
                        yield Chunk(wanted[part], first + starts[part], len(batch), pa.Table.from_batches([batch]))
                    part += 1
            except (OSError, pa.ArrowException) as err:
                if part < len(starts):
                    log.warning("row group %d: cannot be read (%s)", group, err)
                    left = rows - starts[part]
                    yield Chunk(rest, first + starts[part], left, None, f"row group {group} cannot be read")
        first += rows


def _write_chunk(
    export: Export, engine: Engine, chunk: Chunk, out: Path, wish: Wish, hashed: UserHash
) -> dict[str, Any]:
    """One chunk's shard and side file; returns its line of the ledger."""
    rejected: list[dict[str, Any]] = []
    asked: list[tuple[int, str, TextRequest]] = []  # row, user id, request
    if chunk.table is None:
        rejected = [{"row": chunk.first_row + i, "reason": chunk.problem} for i in range(chunk.rows)]
    else:
        positions = max_positions(export)
        for row, values in enumerate(chunk.table.to_pylist(), chunk.first_row):
            try:
                user, request = _request(values, row, wish)
                text_prompt(export, request, positions)
                asked.append((row, user, request))
            except DataError as err:
                rejected.append({"row": row, "reason": str(err)})
    asked.sort(key=lambda one: (one[2].history, one[0]))  # side by side, so that a shared beginning is read once
    results = engine.generate([request for _, _, request in asked])
    records = []
    for (row, user, request), result in zip(asked, results, strict=True):
        told = provenance_of(export, engine.name, request, hashed("", user)).as_dict()
        records.append({"row": row, "text": result.text, "finish_reason": result.finish_reason, **told})
    records.sort(key=lambda record: int(record["row"]))
    _write(out / f"rejected-{chunk.name}.parquet", pa.Table.from_pylist(rejected, schema=REJECTED))
    _write(out / f"part-{chunk.name}.parquet", pa.Table.from_pylist(records, schema=SHARD))
    return {"chunk": chunk.name, "first_row": chunk.first_row, "written": len(records), "rejected": len(rejected)}


def _request(values: dict[str, Any], row: int, wish: Wish) -> tuple[str, TextRequest]:
    """User id and request of one row.

    Raises:
        DataError: a value is missing.
    """
    for name in REQUIRED:
        if not values[name]:
            raise DataError(f"{name} is empty")
    history = values.get("history") or []
    if any(item is None for item in history):
        raise DataError("history holds a null")
    seed = (wish.seed + row) % 2**63
    style = values.get("style") or DEFAULT_STYLE
    request = TextRequest(
        values["item_id"], history[-MAX_HISTORY:], wish.max_tokens, wish.temperature, seed, wish.task, style
    )
    return values["user_id"], request


def ledger_lines(out: Path) -> list[dict[str, Any]]:
    """The ledger's whole lines: first what is written here, then the finished chunks.

    Raises:
        ConfigError: shards without a ledger.
    """
    path = out / LEDGER
    if not path.is_file():
        if any(out.glob("part-*.parquet")):
            raise ConfigError(f"{out}: shards without {LEDGER}; give another folder")
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def open_ledger(out: Path, header: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Finished chunks by name; a new ledger begins with the header, and a last line that a kill cut short goes.

    Raises:
        ConfigError: the folder holds texts of another file, export, prompt or wish than `header` says.
    """
    lines = ledger_lines(out) or [header]
    if lines[0] != header:
        other = [name for name in header if lines[0].get(name) != header[name]]
        raise ConfigError(f"{out}: holds texts made with another {', '.join(other)}; give another folder for these")
    _replace(out / LEDGER, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return {line["chunk"]: line for line in lines[1:]}


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Nobody else writes into the folder meanwhile; a killed process holds nothing."""
    with (out / LOCK).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{out}: another process writes there; wait for it, or give another folder") from None
        yield


def _salt(out: Path) -> bytes:
    """The salt of users' hashes: the environment's, else one that is kept in the folder for a second start."""
    if (given := salt_of_environment()) is not None:
        return given
    path = out / SALT
    if not path.is_file():
        _replace(path, secrets.token_bytes(32))
    return path.read_bytes()


def _append(out: Path, line: dict[str, Any]) -> None:
    with (out / LEDGER).open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(line) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def _write(path: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    _replace(path, sink.getvalue())


def _replace(path: Path, data: bytes | pa.Buffer) -> None:
    """Write a file so that it is there whole or not at all, and is there after a crash."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    if not path.name.startswith("."):
        temporary.chmod(0o644)
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
