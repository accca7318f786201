"""A server on the embedded model for tests, and requests to it over real sockets."""

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from vpae_jax.serving.app import make_app
from vpae_jax.serving.jobs import JobQueue
from vpae_jax.serving.server import address, bind, make_server, run
from vpae_jax.serving.stores import Clips, picture_store
from vpae_jax.serving.worker import Worker

PATIENCE = 600  # seconds; no test depends on how fast anything is


class Server:
    """One that runs in a thread of this process."""

    def __init__(self, worker, host, where):
        self.worker, self.host, self.where = worker, host, where
        self.netloc = urlsplit(where).netloc

    def ask(self, method, path, body=None, headers=()):
        """An answer's status, headers, and body."""
        connection = http.client.HTTPConnection(self.netloc, timeout=PATIENCE)
        try:
            connection.request(method, path, body, dict(headers))
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def json(self, method, path, value=None, headers=()):
        """Status and JSON of an answer."""
        body = value if value is None or isinstance(value, bytes) else json.dumps(value).encode()
        status, _, content = self.ask(method, path, body, headers)
        return status, json.loads(content)

    def clips(self, **asked):
        """What a request becomes in the end."""
        status, found = self.json("POST", "/requests", {"page": "p", "prompt": "a three moves up", **asked})
        assert status == 202, found
        while (state := self.json("GET", f"/requests/{found['request']}")[1])["state"] not in ("done", "superseded"):
            time.sleep(0.02)
        return state


@contextmanager
def serving(entries, folder: Path, generate="button", host="127.0.0.1", ready=True, queue=None, example=""):
    """A server, by default ready."""
    with bind(host, 0) as listening:
        where = address(listening)
        load = {"dtype": "float32", "mesh": None, "decoder": None}
        queue = queue or JobQueue()
        worker = Worker(entries, load, queue, Clips(folder), picture_store(), generate, lambda line: None, where)
        server = make_server(make_app(worker, host, example))
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(run, server, listening, worker)
            try:
                while ready and worker.ready is None and not running.done():
                    time.sleep(0.02)
                if ready and running.done():
                    running.result()  # raises what ended it
                yield Server(worker, host, where)
            finally:
                server.should_exit = True
