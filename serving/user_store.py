"""Users' histories in SQLite or PostgreSQL: an event is on disk before `append` returns, and is never stored twice."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from genrec.errors import ConfigError
from genrec.serving.store_error import StoreError, explain

log = logging.getLogger(__name__)
DIALECTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "sqlite": ("sqlite+pysqlite", sqlite.insert),
    "postgresql": ("postgresql+psycopg", postgresql.insert),
}
LOCK_TIMEOUT_S = 2  # how long a statement waits for another's lock
CONNECT_TIMEOUT_S = 3
POOL_SIZE = 8

_TABLES = sa.MetaData()
_EVENTS = sa.Table(
    "genrec_events",
    _TABLES,
    # SQLite counts only an INTEGER key by itself
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("tenant", sa.Text, nullable=False),
    sa.Column("user_id", sa.Text, nullable=False),
    sa.Column("item_id", sa.Text, nullable=False),
    sa.Column("event_id", sa.Text),  # the client's name for the event; NULLs are never equal
    sa.Column("time", sa.Double, nullable=False),  # seconds since 1970
    sa.Index("genrec_events_by_user", "tenant", "user_id", "time", "id"),
    sa.UniqueConstraint("tenant", "user_id", "event_id", name="genrec_events_once"),
)
_DISABLED = sa.Table("genrec_disabled_items", _TABLES, sa.Column("item_id", sa.Text, primary_key=True))


@dataclass(frozen=True)
class Event:
    """A user met an item."""

    user_id: str
    item_id: str
    event_id: str | None = None  # a second event of this user with the same name is not stored
    timestamp: float | None = None  # seconds since 1970; None: now, but never before the user's newest event


class UserStore:
    """Events by tenant and user, newest last; also the items that were disabled while serving.

    Safe to call from several threads. Every error of the database is a `StoreError` that says what to do.
    """

    def __init__(self, url: str) -> None:
        """Open or make the tables.

        Args:
            url: SQLAlchemy's form: ``sqlite:///users.sqlite3``, ``postgresql://user@host/database``.

        Raises:
            ConfigError: no such kind of database, or an address that is none.
            StoreError: the database cannot be opened.
        """
        self.url = _parsed(url)
        self.shown = self.url.render_as_string(hide_password=True)
        self.insert = DIALECTS[self.url.get_backend_name()][1]
        self._file = self._inode = None
        sqlite_file = self.url.get_backend_name() == "sqlite"
        if sqlite_file:
            if self.url.database in (None, "", ":memory:"):
                raise ConfigError(f"store {self.shown!r}: memory loses every event at exit; name a file or a server")
            self._file = Path(str(self.url.database))
            _make_private(self._file)
        self.database = sa.create_engine(
            self.url,
            pool_size=POOL_SIZE,
            max_overflow=0,
            pool_timeout=LOCK_TIMEOUT_S,
            pool_pre_ping=not sqlite_file,  # a server that was restarted is found again
            connect_args={"timeout": LOCK_TIMEOUT_S} if sqlite_file else {"connect_timeout": CONNECT_TIMEOUT_S},
        )
        sa.event.listen(self.database, "connect", _prepare_sqlite if sqlite_file else _prepare_postgresql)
        with self.errors():
            _TABLES.create_all(self.database)
        self._inode = self._found_inode()

    def append(self, tenant: str, events: Sequence[Event]) -> int:
        """Store all events, or none; they are on disk when this returns.

        Args:
            tenant: whose users they are.
            events: in the order in which they happened.

        Returns:
            How many are new: an event whose `event_id` this user already has is left out.

        Raises:
            StoreError: locked, full or gone. Sending events with `event_id` again is always safe.
        """
        latest = (
            sa.select(sa.func.max(_EVENTS.c.time))
            .where(_EVENTS.c.tenant == sa.bindparam("tenant"), _EVENTS.c.user_id == sa.bindparam("user_id"))
            .scalar_subquery()
        )
        given, now = sa.bindparam("at", type_=sa.Double), sa.bindparam("now", type_=sa.Double)
        newest = sa.func.coalesce(latest, now)
        # a clock that was set back must not put a new event before the old ones
        when = sa.func.coalesce(given, sa.case((newest > now, newest), else_=now))
        statement = self.insert(_EVENTS).values(
            tenant=sa.bindparam("tenant"),
            user_id=sa.bindparam("user_id"),
            item_id=sa.bindparam("item_id"),
            event_id=sa.bindparam("event_id"),
            time=when,
        )
        statement = statement.on_conflict_do_nothing(index_elements=["tenant", "user_id", "event_id"])
        statement = statement.returning(_EVENTS.c.id)  # a row if it is new
        stored = 0
        with self.writing() as connection:
            for event in events:
                values = {
                    "tenant": tenant,
                    "user_id": event.user_id,
                    "item_id": event.item_id,
                    "event_id": event.event_id,
                    "at": event.timestamp,
                    "now": time.time(),
                }
                stored += len(connection.execute(statement, values).all())
        return stored

    def newest(self, tenant: str, user_id: str, limit: int) -> list[str]:
        """The item ids of a user's newest events, oldest first; empty for a user that has none.

        Raises:
            StoreError: locked or gone.
        """
        query = (
            sa.select(_EVENTS.c.item_id)
            .where(_EVENTS.c.tenant == tenant, _EVENTS.c.user_id == user_id)
            .order_by(_EVENTS.c.time.desc(), _EVENTS.c.id.desc())
            .limit(limit)
        )
        with self.reading() as connection:
            return list(connection.scalars(query))[::-1]

    def users(self, tenant: str, limit: int) -> list[str]:
        """The first user ids of a tenant in their order.

        Raises:
            StoreError: locked or gone.
        """
        query = sa.select(_EVENTS.c.user_id).where(_EVENTS.c.tenant == tenant).distinct()
        with self.reading() as connection:
            return list(connection.scalars(query.order_by(_EVENTS.c.user_id).limit(limit)))

    def disabled(self) -> frozenset[str]:
        """The items that are disabled.

        Raises:
            StoreError: locked or gone.
        """
        with self.reading() as connection:
            return frozenset(connection.scalars(sa.select(_DISABLED.c.item_id)))

    def switch(self, disable: Iterable[str], enable: Iterable[str]) -> frozenset[str]:
        """Disable and enable items, durably.

        Returns:
            All items that are disabled now.

        Raises:
            StoreError: locked, full or gone; nothing changed.
        """
        off, on = [{"item_id": item} for item in disable], [{"off": item} for item in enable]
        with self.writing() as connection:
            if off:
                connection.execute(self.insert(_DISABLED).on_conflict_do_nothing(), off)
            if on:
                connection.execute(sa.delete(_DISABLED).where(_DISABLED.c.item_id == sa.bindparam("off")), on)
            return frozenset(connection.scalars(sa.select(_DISABLED.c.item_id)))

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection to read by.

        Raises:
            StoreError: locked or gone.
        """
        with self.errors():
            self._check_file()
            with self.database.connect() as connection:
                yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction; what it wrote is on disk when this ends without an error, and gone when it ends with one.

        Raises:
            StoreError: locked, full or gone.
        """
        with self.errors():
            with self.database.begin() as connection:
                yield connection
            self._check_file()

    def close(self) -> None:
        """Close all connections."""
        self.database.dispose()

    def _found_inode(self) -> tuple[int, int] | None:
        if self._file is None:
            return None
        found = os.stat(self._file)
        return found.st_dev, found.st_ino

    def _check_file(self) -> None:
        """SQLite writes on into a file that was deleted or replaced: its events would be lost without a word."""
        try:
            if self._found_inode() == self._inode:
                return
        except OSError:
            pass
        self.database.dispose()
        raise StoreError("gone", f"store {self.shown}: the file was deleted or replaced; restart the gateway")

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """The database's errors as `StoreError`s, for what `reading` and `writing` do not do."""
        try:
            yield
        except (sa.exc.IntegrityError, sa.exc.DataError):
            raise  # a bug of ours, not the database's state
        except SQLAlchemyError as err:
            raise explain(err, self.shown) from err


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
        name = parsed.get_backend_name()
    except (ArgumentError, NoSuchModuleError, ValueError) as err:
        raise ConfigError(
            "the store's address is none (not shown: it may hold a password); "
            "write sqlite:///users.sqlite3 or postgresql://user@host/database"
        ) from err
    if name not in DIALECTS:
        raise ConfigError(f"no store of kind {name!r}; there are {', '.join(DIALECTS)}")
    return parsed.set(drivername=DIALECTS[name][0])


def _make_private(file: Path) -> None:
    """A new database is its owner's only; SQLite gives the files beside it the same rights."""
    with contextlib.suppress(OSError):  # it is there, or SQLite will say better why it cannot be
        os.close(os.open(file, os.O_CREAT | os.O_EXCL, 0o600))


def _prepare_sqlite(connection: Any, _: object) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")  # readers never wait for a writer
    cursor.execute("PRAGMA synchronous=FULL")  # a commit survives a power cut
    cursor.close()


def _prepare_postgresql(connection: Any, _: object) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT current_setting('synchronous_commit')")
        if cursor.fetchone()[0] in ("off", "local"):  # stricter settings stay
            cursor.execute("SET synchronous_commit = on")
        cursor.execute(f"SET lock_timeout = '{LOCK_TIMEOUT_S}s'")
        cursor.execute(f"SET statement_timeout = '{2 * LOCK_TIMEOUT_S}s'")
    connection.commit()
