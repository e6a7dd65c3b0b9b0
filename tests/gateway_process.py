"""A gateway with an engine that takes its time, as a process for the tests to signal: EXPORT STORE DELAY_S."""

import sys

from genrec.serving.desk import Settings
from genrec.serving.export import Export
from genrec.serving.server import listen, log_as_json, run
from genrec.serving.torch_engine import TorchEngine
from genrec.serving.user_store import UserStore
from tests.engines import FaultyEngine
from tests.understanding import understand

if __name__ == "__main__":
    folder, store, delay_s = sys.argv[1:]
    log_as_json()
    export = Export.load(folder)
    engine = FaultyEngine(TorchEngine(export, "cpu"))
    engine.delay_s = float(delay_s)
    if engine.delay_s < 0:
        engine.delay_s = 0.0
        engine.hang.clear()
    listener = listen("127.0.0.1", 0, with_keys=False)
    settings = Settings(drain_s=1.0, max_batch=4, stall_s=1.0)
    run(engine, export, listener, store=UserStore(store), settings=settings, understand=understand)
