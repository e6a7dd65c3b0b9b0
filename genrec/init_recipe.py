"""Propose a recipe for two files: guess the columns, size the settings, and say why."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from genrec.catalog import FIELDS as ITEM_FIELDS
from genrec.doctor import Machine, machine
from genrec.errors import ConfigError
from genrec.interactions import timestamps
from genrec.tables import read_table, text_column

# Names as people spell them, lower case and without punctuation; the first that is found wins.
_ITEM_ID = (
    "itemid parentasin asin sku productid articleid movieid bookid trackid songid videoid newsid iid id item product"
)
_NAMES = {
    "item_id": _ITEM_ID,
    "title": "title name headline productname itemname productdisplayname prodname displayname movietitle",
    "description": "description desc detaildesc abstract summary overview plot body text longdescription",
    "categories": "categories category genres genre tags maincat department productgroupname producttype",
    "attributes": "attributes details features specs specifications properties",
    "price": "price listprice saleprice amount cost",
    "images": "images image imageurl imagepath picture pictures photo photos poster posterpath img cover",
    "copy": "copy adcopy marketingcopy marketingtext salestext teaser blurb",
    "available": "available availability instock isavailable active",
}
_USER_ID = "userid user customerid customer reviewerid visitorid memberid sessionid session uid clientid accountid"
_TIME = "timestamp time ts datetime date tdat eventtime createdat unixreviewtime reviewtime unixtime day"
_CLOCK = 1e8  # seconds; smaller numbers are running numbers, not times
_PICTURE = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?|avif)$", re.IGNORECASE)
_SAMPLE = 20_000
MIXABLE, MIXED = 1_000, 10_000  # users: from fewer a mixer learns nothing sure, beyond more nothing new


@dataclass(frozen=True)
class Facts:
    """What the sizes follow from."""

    n_items: int
    n_users: int
    n_events: int
    longest: int  # events of the busiest user
    clock: bool  # timestamps are times, not running numbers
    both_sides: int  # users with events before and after the newest tenth of the events
    has_images: bool


def propose_recipe(items: Path, log: Path) -> str:
    """A commented recipe for a catalogue and a log.

    Args:
        items: the catalogue; JSONL, CSV or Parquet.
        log: the interaction log; JSONL, CSV or Parquet.

    Returns:
        YAML that `genrec.config.resolve_recipe` accepts; every number has its reason beside it.

    Raises:
        DataError: a file cannot be read.
        ConfigError: the item, user or time column cannot be told; the message names the candidates.
    """
    items, log = Path(items).resolve(), Path(log).resolve()
    item_table, log_table = read_table(items, {}), read_table(log, {})
    item_key, log_key = _shared_key(items, item_table, log, log_table)
    item_map = {"item_id": item_key} | _content_columns(item_table, item_key)
    user = _user_column(log, log_table, log_key)
    log_map = {
        "user_id": user,
        "item_id": log_key,
        "timestamp": _time_column(log, log_table, {user, log_key}),
    }
    facts = _facts(item_table, log_table, log_map, "images" in item_map)
    return _render(items, log, item_map, log_map, facts, machine())


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _by_name(columns: list[str], names: str) -> str | None:
    plain = {_plain(column): column for column in reversed(columns)}
    return next((plain[name] for name in names.split() if name in plain), None)


def _is_scalar(column: pa.ChunkedArray) -> bool:
    kind = column.type
    return not pa.types.is_nested(kind) and not pa.types.is_null(kind) and not pa.types.is_boolean(kind)


def _shared_key(items: Path, item_table: pa.Table, log: Path, log_table: pa.Table) -> tuple[str, str]:
    """The catalogue's unique column and the log's column that share the most values."""
    best: tuple[float, int, str, str] | None = None
    names = _ITEM_ID.split()
    samples = {
        name: text_column(log_table[name].slice(0, _SAMPLE)).drop_null()
        for name in log_table.column_names
        if _is_scalar(log_table[name])
    }
    for item_column in item_table.column_names:
        if not _is_scalar(item_table[item_column]):
            continue
        ids = text_column(item_table[item_column])
        known = pc.unique(ids.drop_null())
        if len(known) < 0.98 * len(ids):
            continue
        for log_column, sample in samples.items():
            share = pc.mean(pc.is_in(sample, known)).as_py() if len(sample) else 0.0
            rank = -sum(
                names.index(_plain(name)) if _plain(name) in names else len(names) for name in (item_column, log_column)
            )
            if best is None or (round(share, 2), rank) > best[:2]:
                best = (round(share, 2), rank, item_column, log_column)
    if best is None or best[0] < 0.5:
        raise ConfigError(
            f"cannot tell which columns hold the item ids: no unique column of {items} "
            f"{item_table.column_names} has the values of a column of {log} "
            f"{log_table.column_names}. "
            "Check that the files belong together, or write the two column maps by hand"
        )
    return best[2], best[3]


def _content_columns(table: pa.Table, item_key: str) -> dict[str, str]:
    rest = [name for name in table.column_names if name != item_key]
    found: dict[str, str] = {}
    for field in ITEM_FIELDS[1:]:
        column = _by_name(rest, _NAMES[field])
        if column is None and field == "images":
            column = next((name for name in rest if _holds_pictures(table[name])), None)
        if column is not None:
            found[field] = column
            rest.remove(column)
    return found


def _holds_pictures(column: pa.ChunkedArray) -> bool:
    values = column.slice(0, 1000).drop_null().to_pylist()
    paths = [str(value[0] if isinstance(value, list) and value else value) for value in values]
    return bool(paths) and sum(bool(_PICTURE.search(path)) for path in paths) > len(paths) / 2


def _user_column(log: Path, table: pa.Table, item_key: str) -> str:
    rest = [name for name in table.column_names if name != item_key]
    column = _by_name(rest, _USER_ID)
    if column is not None:
        return column
    repeated = [
        name
        for name in rest
        if _is_scalar(table[name])
        and not pa.types.is_floating(table[name].type)
        and not pa.types.is_temporal(table[name].type)
        and _by_name([name], _TIME) is None
        and not _clock_like(timestamps(table[name].slice(0, 1000)))
        and 1 < len(pc.unique(table[name])) < table.num_rows
    ]
    if len(repeated) == 1:
        return repeated[0]
    raise ConfigError(
        f"{log}: cannot tell which column holds the users; candidates: {repeated or rest}. "
        "Rename it to user_id, or write data.interaction_columns: {user_id: YOUR_COLUMN} by hand"
    )


def _time_column(log: Path, table: pa.Table, used: set[str]) -> str:
    rest = [name for name in table.column_names if name not in used and _is_scalar(table[name])]
    column = _by_name(rest, _TIME)
    if column is not None:
        return column
    like_time = [name for name in rest if _clock_like(timestamps(table[name].slice(0, 1000)))]
    if len(like_time) == 1:
        return like_time[0]
    raise ConfigError(
        f"{log}: cannot tell which column holds the time of an event; candidates: {like_time or rest}. "
        "Rename it to timestamp (numbers or ISO dates; a running number will do), or write "
        "data.interaction_columns by hand"
    )


def _clock_like(seconds: np.ndarray) -> bool:
    known = seconds[np.isfinite(seconds)]
    return len(known) > len(seconds) / 2 and bool(np.median(known) > _CLOCK) and len(np.unique(known)) > 1


def _facts(item_table: pa.Table, log_table: pa.Table, log_map: dict[str, str], has_images: bool) -> Facts:
    times = timestamps(log_table[log_map["timestamp"]])
    events = pa.table({"user": text_column(log_table[log_map["user_id"]]), "time": times})
    users = events.group_by("user").aggregate([("time", "count"), ("time", "min"), ("time", "max")])
    counts = users["time_count"].to_numpy()
    cut = np.nanquantile(times, 0.9)
    both = (users["time_min"].to_numpy() < cut) & (users["time_max"].to_numpy() >= cut)
    return Facts(
        n_items=item_table.num_rows,
        n_users=len(counts),
        n_events=log_table.num_rows,
        longest=int(counts.max()),
        clock=_clock_like(times),
        both_sides=int(both.sum()),
        has_images=has_images,
    )


def _power_of_two(at_least: float, low: int, high: int) -> int:
    return int(np.clip(2 ** int(np.ceil(np.log2(max(at_least, 1)))), low, high))


def _render(
    items: Path, log: Path, item_map: dict[str, str], log_map: dict[str, str], facts: Facts, here: Machine
) -> str:
    gpu = here.gpus[0] if here.gpus else None
    where = f"{gpu.name}, {gpu.memory_gb:.0f} GiB" if gpu else f"no GPU, {here.cores} cores, {here.memory_gb:.0f} GiB"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", items.parent.name).strip("-.") or "mine"
    levels = 3 if facts.n_items <= 2048**2 else 4
    codes = _power_of_two(facts.n_items**0.5, 16, 2048)
    cap = 200 if gpu else 50
    history = int(np.clip(facts.longest, 10, cap))
    row = history * (levels + 1) + 64
    pack = _power_of_two(row, 512, 4096)
    tokens = 32_768 if gpu and gpu.memory_gb >= 16 else 8_192 if gpu or here.memory_gb >= 8 else 4_096
    rows = max(1, tokens // pack)
    seen = min(facts.n_events, facts.n_users * history)
    most = 20_000 if not gpu and facts.n_users > 50_000 else None
    if most:
        seen = seen * most // facts.n_users
    epochs = int(np.clip(round(1_000_000 / seen), 3, 20))
    temporal = facts.clock and facts.both_sides >= max(100, facts.n_users // 20)
    if temporal:
        split = "temporal"
        why = f"real times, and {facts.both_sides} users have events on both sides of the newest tenth"
    else:
        split = "leave_one_out"
        why = "too few users on both sides of a time cut" if facts.clock else "the timestamps give order, not times"
    lines = [
        f"# For {facts.n_items} items, {facts.n_users} users, {facts.n_events} events; machine: {where}.",
        f"name: {json.dumps(name)}  # the run's folder",
        "seed: 0  # every random choice follows from it",
        "data:",
        f"  items: {json.dumps(str(items))}",
        f"  interactions: {json.dumps(str(log))}",
        *_mapping("item_columns", item_map),
        *_mapping("interaction_columns", log_map),
        "  max_bad_share: 0.01  # more bad rows than one in a hundred usually mean a wrong column",
        f"  split: {split}  # {why}",
        f"  max_history: {history}  # the busiest user has {facts.longest} events; at most {cap} here",
        f"  max_users: {most or 'null'}  # "
        + ("a sample, so that a first run on the CPU ends; null for all" if most else "all of them"),
        "encode:",
        "  text: {kind: builtin}  # needs no download; kind: sentence_transformers with a model is stronger",
        "  image: {kind: builtin}  # as above; kind: transformers with a vision model is stronger"
        if facts.has_images
        else "  image: null  # the catalogue has no picture column",
        "semantic_ids:",
        f"  levels: {levels}  # {codes}^{levels} ids; the last level parts items that are alike",
        f"  codes: {codes}  # a power of two near the square root of {facts.n_items} items",
        "backbone:",
        '  base: "scratch:"  # small and made here; with a GPU also a Hugging Face name: Qwen/Qwen3-0.6B',
        "  neighbours: 200  # per item: what the same users took, and what they took next",
        "adapter:",
        "  kind: mlp  # learns in fewer steps than qformer, which is for patches and larger bases",
        "finetune:",
        f"  epochs: {epochs}  # about a million training events in all ({seen} an epoch), within 3 to 20",
        f"  pack_tokens: {pack}  # the longest prompt: {row} tokens, {history} x ({levels} ids + 1 soft)",
        f"  batch_rows: {rows}  # {rows * pack} tokens per step: {where}",
    ]
    if facts.n_users >= MIXABLE:
        lines += [
            "mix:",
            f"  users: {MIXED}  # validation users at most; they teach a small network to order the lists",
        ]
    return "\n".join(lines) + "\n"


def _mapping(key: str, columns: dict[str, str]) -> list[str]:
    renamed = {field: column for field, column in columns.items() if field != column}
    kept = [field for field in columns if field not in renamed]
    note = f"  # found under their own names: {', '.join(kept)}" if kept else ""
    if not renamed:
        return [f"  {key}: {{}}{note}"]
    return [f"  {key}:{note}", *(f"    {field}: {json.dumps(column)}" for field, column in renamed.items())]
