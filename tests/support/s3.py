"""An S3 server on loopback, whose requests are counted and can be made to fail."""

import threading
from contextlib import contextmanager

from moto.server import DomainDispatcherApplication, create_backend_app
from pyarrow.fs import S3FileSystem
from werkzeug.serving import make_server

BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "not for any log"}


class Store:
    """The server, between its clients and moto."""

    def __init__(self):
        self.app = DomainDispatcherApplication(create_backend_app)
        self.answer: str | None = None  # in place of moto's, while it is set
        self.refused = 0
        self.server = make_server("127.0.0.1", 0, self.handle, threaded=True)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def handle(self, environ, start_response):
        if self.answer:
            self.refused += 1
            start_response(self.answer, [("Content-Length", "0")])
            return [b""]
        return self.app(environ, start_response)

    @property
    def environment(self) -> dict[str, str]:
        return {**KEYS, "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": self.url}

    @contextmanager
    def failing(self, answer: str, seconds: float):
        """Answer every request so, for some seconds of what follows."""
        self.answer = answer
        timer = threading.Timer(seconds, self.recover)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            self.recover()

    def recover(self) -> None:
        self.answer = None


@contextmanager
def running():
    store = Store()
    files = S3FileSystem(
        access_key=KEYS["AWS_ACCESS_KEY_ID"],
        secret_key=KEYS["AWS_SECRET_ACCESS_KEY"],
        endpoint_override=store.url,
        allow_bucket_creation=True,
    )
    files.create_dir(BUCKET)
    yield store
    store.server.shutdown()
