"""The interaction log: every user's events in time order."""

from __future__ import annotations

import datetime
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from genrec.catalog import CONTROL, Catalogue
from genrec.errors import ArtefactError, DataError
from genrec.quarantine import Quarantine, stop_above
from genrec.tables import read_table, text_column

log = logging.getLogger(__name__)
FIELDS = ("user_id", "item_id", "timestamp", "event", "weight", "review")
_FILE = "log.parquet"
_REASONS = (
    "no user_id",
    "no item_id",
    "item not in the catalogue",
    "no timestamp",
    "timestamp is neither a number nor an ISO date",
    "duplicate event",
)


@dataclass(frozen=True)
class Log:
    """Every user's events in time order, as one flat array.

    User ``u`` owns ``items[offsets[u]:offsets[u + 1]]``, oldest first: with offsets ``[0, 2, 5]`` the
    second user has events 2, 3 and 4.

    Attributes:
        user_ids: unique ids, in order of first appearance in the file.
        offsets: int64 [U+1].
        items: int32 [E], rows of the catalogue.
        times: float64 [E], seconds for dates, else the file's own unit.
        reviews: E texts that users wrote about their events, empty where there is none; None: the file has no such
            column.
    """

    user_ids: list[str]
    offsets: np.ndarray
    items: np.ndarray
    times: np.ndarray
    reviews: list[str] | None = None

    def history(self, user: int) -> np.ndarray:
        """A user's items, oldest first, int32."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]

    def save(self, folder: Path) -> None:
        """Write ``log.parquet`` (one row per user) into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        offsets = pa.array(self.offsets, pa.int64())
        table = pa.table(
            {
                "user_id": pa.array(self.user_ids, pa.string()),
                "items": pa.LargeListArray.from_arrays(offsets, pa.array(self.items, pa.int32())),
                "times": pa.LargeListArray.from_arrays(offsets, pa.array(self.times, pa.float64())),
            }
        )
        if self.reviews is not None:
            reviews = pa.LargeListArray.from_arrays(offsets, pa.array(self.reviews, pa.string()))
            table = table.append_column("reviews", reviews)
        pa.parquet.write_table(table, folder / _FILE)

    @classmethod
    def load(cls, folder: Path) -> Log:
        """Read what `save` wrote.

        Raises:
            ArtefactError: there is no log in `folder`, or it is damaged.
        """
        try:
            table = pa.parquet.read_table(folder / _FILE)
        except (OSError, pa.ArrowInvalid) as err:
            raise ArtefactError(f"{folder / _FILE}: no log there ({err}); run `genrec run`") from err
        lengths = pc.list_value_length(table["items"]).to_numpy()
        return cls(
            user_ids=table["user_id"].to_pylist(),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            items=pc.list_flatten(table["items"]).to_numpy().astype(np.int32, copy=False),
            times=pc.list_flatten(table["times"]).to_numpy(),
            reviews=pc.list_flatten(table["reviews"]).to_pylist() if "reviews" in table.column_names else None,
        )


def read_log(
    path: Path, columns: dict[str, str], catalogue: Catalogue, *, max_bad_share: float
) -> tuple[Log, Quarantine]:
    """Read a log, set its bad rows aside and sort it by user, time and row.

    Args:
        path: JSONL, CSV or Parquet with user_id, item_id and timestamp (numbers or ISO dates; without a time
            zone they count as UTC); review, where there is one.
        columns: our field -> their column, where the names differ.
        catalogue: events of other items are bad.
        max_bad_share: stop when more of the rows than this are bad.

    Raises:
        DataError: the file cannot be read, lacks a column, is empty, or too many of its rows are bad.
    """
    path = Path(path)
    unknown = sorted(set(columns) - set(FIELDS))
    if unknown:
        raise DataError(f"{path}: interaction_columns maps unknown fields {unknown}; the fields are {list(FIELDS)}")
    table = read_table(path, columns)
    if table.num_rows == 0:
        raise DataError(f"{path}: the log is empty; expected one row per event")
    for field in ("user_id", "item_id", "timestamp"):
        if field not in table.column_names:
            why = " (the order of events needs it; a running number will do)" if field == "timestamp" else ""
            raise DataError(
                f"{path}: no {field} column{why}; the columns there are {table.column_names}. Name yours in "
                f"the recipe (data.interaction_columns: {{{field}: YOUR_COLUMN}}), "
                "or let `genrec init` propose it"
            )
    users = text_column(table["user_id"]).combine_chunks().dictionary_encode()
    item_ids = text_column(table["item_id"])
    user = pc.fill_null(users.indices, -1).to_numpy().astype(np.int64)
    item = pc.fill_null(pc.index_in(item_ids, pa.array(catalogue.item_ids)), -1).to_numpy().astype(np.int32)
    time = timestamps(table["timestamp"])
    reason = np.select(
        [
            user < 0,
            item_ids.is_null().to_numpy(),
            item < 0,
            table["timestamp"].is_null().to_numpy(),
            ~np.isfinite(time),
        ],
        range(5),
        -1,
    )
    order = np.lexsort((item, time, user, reason >= 0))  # stable: equal events stay in row order
    order = order[: np.count_nonzero(reason < 0)]
    same = (np.diff(user[order]) == 0) & (np.diff(item[order]) == 0) & (np.diff(time[order]) == 0)
    reason[order[1:][same]] = _REASONS.index("duplicate event")
    bad = _set_aside(path, table, item_ids, reason, max_bad_share)

    rows = np.flatnonzero(reason < 0)
    if not len(rows):
        raise DataError(f"{path}: none of the {bad.n_rows} rows is usable: {bad.counts}")
    rows = rows[np.lexsort((time[rows], user[rows]))]
    kept, starts = np.unique(user[rows], return_index=True)
    result = Log(
        user_ids=users.dictionary.take(pa.array(kept)).to_pylist(),
        offsets=np.append(starts, len(rows)).astype(np.int64),
        items=item[rows],
        times=time[rows],
        reviews=_reviews(path, table["review"].take(pa.array(rows))) if "review" in table.column_names else None,
    )
    log.info("%s: %d users, %d events", path, len(result.user_ids), len(rows))
    return result, bad


def _reviews(path: Path, column: pa.ChunkedArray) -> list[str]:
    if pa.types.is_nested(column.type):
        raise DataError(
            f"{path}: review holds {column.type}, expected text; name another column in the recipe "
            "(data.interaction_columns: {review: YOUR_COLUMN})"
        )
    return [CONTROL.sub("", text or "") for text in text_column(column).to_pylist()]


def _set_aside(
    path: Path, table: pa.Table, item_ids: pa.ChunkedArray, reason: np.ndarray, max_bad_share: float
) -> Quarantine:
    """The rows with a reason >= 0; when there are too many, only the first few are turned into JSON."""
    rows = np.flatnonzero(reason >= 0)
    numbers, totals = np.unique(reason[rows], return_counts=True)
    counts = {_REASONS[number]: int(total) for number, total in zip(numbers, totals, strict=True)}

    def entries(some: np.ndarray) -> Quarantine:
        raw = [json.dumps(row, ensure_ascii=False, default=str) for row in table.take(some).to_pylist()]
        names = [_REASONS[number] for number in reason[some]]
        return Quarantine(path, len(reason), (some + 1).tolist(), item_ids.take(some).to_pylist(), names, raw)

    stop_above(entries(rows[:10]), counts, len(rows), max_bad_share)
    bad = entries(rows)
    bad.check(max_bad_share)
    return bad


def timestamps(column: pa.ChunkedArray) -> np.ndarray:
    """Timestamps as float64 [E]; NaN where they are missing or cannot be read."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return timestamps(column.cast(kind.value_type))
    if pa.types.is_temporal(kind) and not pa.types.is_duration(kind) and not pa.types.is_time(kind):
        micros = column.cast(pa.timestamp("us", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
        return pc.divide(micros.cast(pa.float64(), safe=False), 1e6).to_numpy()
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return column.cast(pa.float64(), safe=False).to_numpy().astype(np.float64)
    if not pa.types.is_string(kind) and not pa.types.is_large_string(kind):
        return np.full(len(column), np.nan)
    try:
        return column.cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        return np.fromiter(map(_parse, column.to_pylist()), np.float64, len(column))


def _parse(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        pass
    try:
        when = datetime.datetime.fromisoformat((text or "").strip())
    except ValueError:
        return np.nan
    return (when if when.tzinfo else when.replace(tzinfo=datetime.UTC)).timestamp()
