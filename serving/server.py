"""The process around the gateway: where it may listen, how it starts, how it ends."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
import time
from pathlib import Path
from types import FrameType

from genrec.errors import ConfigError

try:
    import fastapi  # noqa: F401 - the modules below need it
    import uvicorn
    from sqlalchemy.engine import make_url
except ImportError as err:
    raise ConfigError(f"the gateway needs {err.name}; install genrec[serve]") from err

from genrec.serving.access import LOOPBACK_HOSTS, Drain
from genrec.serving.api_keys import Keys
from genrec.serving.bodies import MAX_TIMEOUT_MS
from genrec.serving.chat import Understand
from genrec.serving.connections import PatientProtocol
from genrec.serving.desk import Settings
from genrec.serving.engine import Engine, RecommendRequest
from genrec.serving.export import Export
from genrec.serving.gateway import create_app
from genrec.serving.request_log import JsonFormatter
from genrec.serving.select_engine import make_engine
from genrec.serving.understand import understand
from genrec.serving.user_store import UserStore

log = logging.getLogger(__name__)
MAX_CONNECTIONS = 512  # uvicorn answers 503 to more: a backstop behind the queue
STOP_S = MAX_TIMEOUT_MS // 1000 + 5  # the longest accepted request, and some


class DrainingServer(uvicorn.Server):
    """On SIGTERM or SIGINT: refuse new requests with 503 for a moment, finish accepted ones, return; exit code 0.

    A second signal skips the moment. uvicorn itself would end by the signal and close the door at once.
    """

    def __init__(self, config: uvicorn.Config, drain: Drain, drain_s: float) -> None:
        super().__init__(config)
        self._drain, self._drain_s = drain, drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain.since is None:
            self._drain.start()
        else:
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        since = self._drain.since
        if since is not None and time.monotonic() - since >= self._drain_s:
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int, *, with_keys: bool) -> socket.socket:
    """A listening socket; without API keys on a loopback address only.

    Raises:
        ConfigError: no such address, a taken port, or an open address without keys.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as err:
        raise ConfigError(f"--host {host}: no such address ({err}); try 127.0.0.1") from err
    if not with_keys and not ipaddress.ip_address(address[0]).is_loopback:
        raise ConfigError(
            f"--host {host} without API keys would let everyone who reaches it read and write histories; make a key "
            "with `genrec keys add FILE --tenant NAME --scope recommend` and serve with --keys FILE, or listen on "
            "127.0.0.1"
        )
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(1024)
    except OSError as err:
        listener.close()
        raise ConfigError(f"--host {host} --port {port}: cannot listen ({err.strerror}); take another port") from err
    return listener


def own_hosts(listener: socket.socket) -> frozenset[str]:
    """The names by which a server on a loopback address may be asked."""
    address = listener.getsockname()[0]
    return LOOPBACK_HOSTS | {f"[{address}]" if ":" in address else address}


def open_store(store: str | None, export_dir: Path, *, typed: bool = False) -> UserStore | None:
    """The user store of an address; None: a SQLite file beside the export; "none": no store.

    Args:
        store: see `UserStore`.
        export_dir: the export's folder.
        typed: whether the address was typed on the command line, where other users of the machine can read it.

    Raises:
        ConfigError: no such kind of store, or a typed password.
        StoreError: the store cannot be opened.
    """
    if store == "none":
        return None
    if store is None:
        return UserStore(f"sqlite:///{export_dir.resolve().parent / 'users.sqlite3'}")
    if typed and "://" in store and make_url(store).password is not None:
        raise ConfigError(
            "--store holds a password, which everyone on this machine can read in the list of processes; give the "
            "address in the environment variable GENREC_STORE, or the password in PostgreSQL's ~/.pgpass"
        )
    return UserStore(store)


def run(
    engine: Engine,
    export: Export,
    listener: socket.socket,
    *,
    store: UserStore | None = None,
    keys: Keys | None = None,
    settings: Settings | None = None,
    understand: Understand | None = None,
) -> None:
    """Serve until a signal comes, then end in order; closes store and engine. Arguments as for `create_app`."""
    settings = settings or Settings()
    hosts = None if keys else own_hosts(listener)
    app = create_app(engine, export, store=store, keys=keys, hosts=hosts, settings=settings, understand=understand)
    desk = app.state.gateway
    config = uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=STOP_S,
    )
    host, port = listener.getsockname()[:2]
    log.info("serving %s on http://%s:%d", export.folder, f"[{host}]" if ":" in host else host, port)
    DrainingServer(config, desk.drain, settings.drain_s).run(sockets=[listener])
    if store is not None:
        store.close()
    if not desk.worker.close(timeout_s=0.5):
        log.error("the engine hangs; leaving without it")
        logging.shutdown()
        sys.stdout.flush()
        # every request has its answer; a hung thread inside an engine could keep the interpreter from ending
        os._exit(0)
    engine.close()
    log.info("stopped")


def serve(
    export_dir: Path,
    engine: str = "auto",
    host: str = "127.0.0.1",
    port: int = 8000,
    store: str | None = None,
    keys: Path | None = None,
    typed_store: bool = False,
) -> None:
    """Serve an export until interrupted.

    Raises:
        ArtefactError: the folder is no whole export.
        ConfigError: no such engine, address, store or keys; or an open address without keys.
        StoreError: the user store cannot be opened.
    """
    found = Keys(keys) if keys is not None else None
    listener = listen(host, port, with_keys=found is not None)  # what is wrong here shows before minutes of loading
    export = Export.load(export_dir)
    histories = open_store(store, export_dir, typed=typed_store)
    running = make_engine(export, engine, measure_first=True)
    running.recommend([RecommendRequest([], k=1)])  # compiles and allocates what the first user would wait for
    chats = "chat" in export.tasks
    if not chats:
        log.info("no chat: this export was not trained for it (finetune.mixture.chat)")
    run(running, export, listener, store=histories, keys=found, understand=understand if chats else None)


def log_as_json(level: int = logging.INFO) -> None:
    """Every line of the process's log as JSON on standard error, and no progress bars between them."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("genrec").setLevel(level)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
