"""A server on loopback that speaks to clients of Google's Cloud Storage."""

import multiprocessing
from contextlib import contextmanager
from functools import partial
from http.server import ThreadingHTTPServer

from tests.support.s3 import BUCKET


def serve(port) -> None:
    """In a process of its own: Arrow may hold Python's lock while it waits for it."""
    from gcp_storage_emulator.handlers.buckets import create_bucket
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    class Quiet(RequestHandler):
        def log_message(self, *_):
            """Says nothing about any request."""

    storage = Storage(use_memory_fs=True)
    create_bucket(BUCKET, storage)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, storage))
    server.handle_error = lambda *_: None  # a client that has read enough hangs up
    port.send(server.server_port)
    server.serve_forever()


@contextmanager
def running():
    """Yields the environment variables of its clients."""
    ours, theirs = multiprocessing.Pipe()
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    yield {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{ours.recv()}"}
    process.kill()
    process.join()
