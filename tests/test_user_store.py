"""The user store on a real SQLite file and a real PostgreSQL server: order, idempotence, durability, faults."""

import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from genrec.errors import ConfigError
from genrec.serving import user_store
from genrec.serving.store_error import StoreError
from genrec.serving.user_store import Event, UserStore
from tests.postgres_fixture import Cluster


@pytest.fixture
def store(url: str) -> Iterator[UserStore]:
    made = UserStore(url)
    with made.database.begin() as connection:
        connection.exec_driver_sql("DELETE FROM genrec_events")
        connection.exec_driver_sql("DELETE FROM genrec_disabled_items")
    yield made
    made.close()


def events(user: str, *items: str, start: float = 1000.0) -> list[Event]:
    return [Event(user, item, timestamp=start + i) for i, item in enumerate(items)]


def test_the_newest_come_oldest_first(store: UserStore) -> None:
    assert store.newest("shop", "ann", 5) == []
    assert store.append("shop", events("ann", "a", "b", "c", "d")) == 4
    assert store.newest("shop", "ann", 3) == ["b", "c", "d"]
    assert store.append("shop", events("ann", "late", start=1000.5)) == 1
    assert store.newest("shop", "ann", 9) == ["a", "late", "b", "c", "d"]


def test_users_and_tenants_are_apart(store: UserStore) -> None:
    store.append("shop", [*events("ann", "a"), *events("bob", "b")])
    store.append("news", events("ann", "n"))
    assert store.newest("shop", "ann", 5) == ["a"]
    assert store.newest("news", "ann", 5) == ["n"]
    assert store.newest("news", "bob", 5) == []
    store.append("shop", events("ann", "c"))
    assert store.users("shop", 5) == ["ann", "bob"]
    assert store.users("shop", 1) == store.users("news", 5) == ["ann"]
    assert store.users("nobody", 5) == []


def test_an_event_with_a_name_is_stored_once(store: UserStore) -> None:
    first = [Event("ann", "a", "e1", 1.0), Event("ann", "b", "e2", 2.0), Event("ann", "b", "e2", 3.0)]
    assert store.append("shop", first) == 2
    assert store.append("shop", [Event("ann", "c", "e1", 4.0), Event("ann", "d", "e3", 5.0)]) == 1
    assert store.newest("shop", "ann", 9) == ["a", "b", "d"]
    assert store.append("shop", [Event("bob", "a", "e1", 1.0)]) == 1  # another user's name
    assert store.append("shop", [Event("ann", "a"), Event("ann", "a")]) == 2  # without a name each one counts


def test_a_clock_set_back_does_not_reorder(store: UserStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([5000.0, 100.0, 6000.0])
    monkeypatch.setattr(user_store.time, "time", lambda: next(clock))
    for item in ("a", "b", "c"):
        store.append("shop", [Event("ann", item)])
    assert store.newest("shop", "ann", 9) == ["a", "b", "c"]


def test_many_writers_lose_nothing(store: UserStore) -> None:
    def write(name: int) -> None:
        for i in range(20):
            store.append("shop", [Event("ann", f"{name}-{i}", f"{name}-{i}")])
            store.append("shop", [Event("ann", f"{name}-{i}", f"{name}-{i}")])

    threads = [threading.Thread(target=write, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = store.newest("shop", "ann", 1000)
    assert sorted(found) == sorted(f"{name}-{i}" for name in range(4) for i in range(20))


def test_a_transaction_is_whole_or_absent(store: UserStore) -> None:
    bad = [*events("ann", "a", "b"), Event("ann", None, timestamp=9.0)]  # type: ignore[arg-type]
    with pytest.raises(sa.exc.IntegrityError, match="item_id"):
        store.append("shop", bad)
    assert store.newest("shop", "ann", 9) == []


def test_names_and_ids_are_values_not_sql(store: UserStore) -> None:
    user = "x'); DROP TABLE genrec_events; --\u00e9\U0001f600"
    store.append("t\"'", events(user, "' OR 1=1"))
    assert store.newest("t\"'", user, 9) == ["' OR 1=1"]
    assert store.newest("t\"'", "' OR '1'='1", 9) == []


def test_disabled_items_outlive_the_store(store: UserStore, url: str) -> None:
    assert store.switch(["a", "b"], []) == {"a", "b"}
    assert store.switch(["a", "c"], ["b", "never"]) == {"a", "c"}
    again = UserStore(url)
    assert again.disabled() == {"a", "c"}
    again.close()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("users.sqlite3", "the store's address is none"),
        ("mysql://host/db", "no store of kind 'mysql'"),
        ("sqlite://", "memory loses every event"),
    ],
)
def test_wrong_addresses_are_named(address: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UserStore(address)


def test_a_password_is_never_shown() -> None:
    with pytest.raises(StoreError, match=r"postgresql\+psycopg://me:\*\*\*@127.0.0.1:1/db is gone") as raised:
        UserStore("postgresql://me:hunter2@127.0.0.1:1/db")
    assert "hunter2" not in str(raised.value)


# -- SQLite's faults ---------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "users.sqlite3"


@pytest.fixture
def on_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UserStore]:
    monkeypatch.setattr(user_store, "LOCK_TIMEOUT_S", 0.2)
    made = UserStore(f"sqlite:///{file}")
    yield made
    made.close()


def test_every_commit_is_synchronous(on_file: UserStore) -> None:
    with on_file.database.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


def test_a_new_file_is_its_owners_only(on_file: UserStore, file: Path) -> None:
    on_file.append("shop", events("ann", "a"))
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in file.parent.glob("users*")}
    assert modes == {"users.sqlite3": "0o600", "users.sqlite3-wal": "0o600", "users.sqlite3-shm": "0o600"}


def test_sqlite_locked(on_file: UserStore, file: Path) -> None:
    on_file.append("shop", events("ann", "a"))
    with sqlite3.connect(file, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"locked \(SQLITE_BUSY.*send the request again") as raised:
            on_file.append("shop", events("ann", "b"))
        assert raised.value.kind == "locked"
        assert on_file.newest("shop", "ann", 9) == ["a"]  # readers do not wait
        other.execute("ROLLBACK")
    assert on_file.append("shop", events("ann", "b", start=2000.0)) == 1
    assert on_file.newest("shop", "ann", 9) == ["a", "b"]


def test_sqlite_full(on_file: UserStore) -> None:
    with on_file.database.connect() as connection:  # the pool's only connection
        used = connection.exec_driver_sql("PRAGMA page_count").scalar()
        assert connection.exec_driver_sql(f"PRAGMA max_page_count={used}").scalar() == used
    with pytest.raises(StoreError, match=r"full \(SQLITE_FULL.*free some space"):
        on_file.append("shop", events("ann", *(f"{'x' * 200}{i}" for i in range(200))))
    assert on_file.newest("shop", "ann", 9) == []


def test_a_full_disk(tiny_disk: Path) -> None:
    made = UserStore(f"sqlite:///{tiny_disk}/users.sqlite3")
    kept = 0

    def fill() -> None:
        nonlocal kept
        for turn in range(1000):
            kept += made.append("shop", events("ann", *("x" * 250 for _ in range(20)), start=turn * 100.0))

    with pytest.raises(StoreError, match="is full"):
        fill()
    assert len(made.newest("shop", "ann", 10**6)) == kept > 0
    made.close()


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_sqlite_gone(on_file: UserStore, file: Path, how: str) -> None:
    on_file.append("shop", events("ann", "a"))
    if how == "replaced":
        shutil.copy(file, file.with_suffix(".new"))
        os.replace(file.with_suffix(".new"), file)
    else:
        file.unlink()
    with pytest.raises(StoreError, match="deleted or replaced") as raised:
        on_file.append("shop", events("ann", "b"))
    assert raised.value.kind == "gone"
    with pytest.raises(StoreError, match="deleted or replaced"):
        on_file.newest("shop", "ann", 9)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nowhere/users.sqlite3 is gone \(SQLITE_CANTOPEN"):
        UserStore(f"sqlite:///{tmp_path}/nowhere/users.sqlite3")


# -- PostgreSQL's faults -----------------------------------------------------------------------------------------


def test_postgresql_locked(postgres: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_store, "LOCK_TIMEOUT_S", 1)
    made = UserStore(postgres.url)
    with made.database.begin() as other:
        other.execute(sa.text("LOCK TABLE genrec_events IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(StoreError, match=r"locked .*55P03"):
            made.append("locked", events("ann", "a"))
    assert made.append("locked", events("ann", "a")) == 1
    made.close()


def test_postgresql_crash_loses_nothing_and_is_survived(postgres: Cluster) -> None:
    made = UserStore(postgres.url)
    assert made.append("crash", events("ann", "a", "b")) == 2
    postgres.stop("immediate")
    try:
        with pytest.raises(StoreError, match="is gone"):
            made.append("crash", events("ann", "c"))
    finally:
        postgres.start()
    assert made.newest("crash", "ann", 9) == ["a", "b"]
    assert made.append("crash", events("ann", "c", start=2000.0)) == 1
    made.close()


def test_postgresql_commits_are_synchronous_whatever_the_role_says(postgres: Cluster) -> None:
    made = UserStore(postgres.url)
    with made.database.begin() as connection:
        connection.exec_driver_sql("ALTER ROLE tester SET synchronous_commit = off")
    again = UserStore(postgres.url)
    with again.database.begin() as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
        connection.exec_driver_sql("ALTER ROLE tester RESET synchronous_commit")
    made.close()
    again.close()
