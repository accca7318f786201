"""Servers of both protocols on this machine, and a network that fails now and then."""

import itertools
import logging
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gcp_storage_emulator.server import create_server
from gcsfs.core import GCSFileSystem
from moto.server import ThreadedMotoServer
from s3fs.core import S3FileSystem

from vpae_jax.data.stores import Address

HOST = "127.0.0.1"


class S3:
    """moto's server, which this process and its children find; `requests` are the lines of its log.

    Args:
      patch: sets the environment.
    """

    def __init__(self, patch: pytest.MonkeyPatch):
        self.requests: list[str] = []
        log = logging.Handler()
        log.emit = lambda record: self.requests.append(record.getMessage())
        logging.getLogger("werkzeug").addHandler(log)
        logging.getLogger("werkzeug").setLevel(logging.INFO)
        logging.getLogger("werkzeug").propagate = False
        self._server = ThreadedMotoServer(HOST, 0, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, "/nowhere")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{HOST}:{self.port}")
        self.files = S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        if not self.files.exists("bucket"):  # all servers of a process have one memory
            self.files.mkdir("bucket")

    def put(self, folder: Path, name: str) -> Address:
        self.files.put(str(folder), f"bucket/{name}", recursive=True)
        return Address(f"s3://bucket/{name}")

    def stop(self) -> None:
        self._server.stop()


@contextmanager
def google(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[Address]:
    """An emulator of Google's store, with a copy of the folder."""
    server = create_server(HOST, 0, in_memory=True, default_bucket="bucket")
    server.start()
    try:
        port = server._api._httpd.server_address[1]
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://{HOST}:{port}")
        patch.setenv("NO_GCE_CHECK", "true")
        GCSFileSystem.clear_instance_cache()
        GCSFileSystem(use_listings_cache=False).put(str(folder), "bucket/records", recursive=True)
        yield Address("gs://bucket/records")
    finally:
        server.stop()
        GCSFileSystem.clear_instance_cache()


class BadNetwork:
    """Passes connections on to a port; of those that bring over `limit` bytes, every third breaks there.

    Attributes:
      port: where it listens.
      broken: how many connections it broke.
    """

    def __init__(self, target: int, limit: int):
        self._target, self._limit, self._long, self.broken = target, limit, itertools.count(), 0
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near = self._listener.accept()[0]
            except OSError:  # closed
                return
            far = socket.create_connection((HOST, self._target))
            threading.Thread(target=self._pass, args=(near, far, sys.maxsize), daemon=True).start()
            threading.Thread(target=self._pass, args=(far, near, self._limit), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, left: int) -> None:
        with source, sink:
            try:
                while data := source.recv(4096):
                    if left >= 0 and (left := left - len(data)) < 0 and next(self._long) % 3 == 0:
                        self.broken += 1
                        break
                    sink.sendall(data)
                source.shutdown(socket.SHUT_RDWR)
                sink.shutdown(socket.SHUT_RDWR)
            except OSError:  # the other direction has ended
                return
