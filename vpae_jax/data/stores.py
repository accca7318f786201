"""Files in object stores, by address: gs://bucket/folder and s3://bucket/folder.

They are read with gcsfs and s3fs, which are installed separately (`pip install 'vpae_jax[buckets]'`). These libraries
find credentials, proxies and endpoints like the stores' own tools, and retry transient errors. If they give up, this is
a `UserError`: it says nothing about the stored data, so it must end the run rather than change what is trained on.
"""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vpae_jax.types import UserError


@dataclass(frozen=True)
class _Kind:
    """A kind of store.

    Attributes:
      library: the library that reads it.
      system: its file system class; for gcsfs the plain one, since the default one queries a bucket's layout at every
        read if it lacks the permission to see it.
      credentials: where credentials come from, for messages.
      failures: exceptions that the library raises besides `OSError`.
      options: options passed to it, in addition to the user's general settings.
    """

    library: str
    system: str
    credentials: str
    failures: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


KINDS = {
    "gs": _Kind(
        "gcsfs",
        "gcsfs.core:GCSFileSystem",
        "`gcloud auth application-default login`, or GOOGLE_APPLICATION_CREDENTIALS",
        (
            "aiohttp:ClientError",
            "gcsfs.retry:ChecksumError",
            "gcsfs.retry:HttpError",
            "google.auth.exceptions:GoogleAuthError",
            "requests:RequestException",
            "builtins:ValueError",  # a request that the server rejects as bad
        ),
    ),
    "s3": _Kind(
        "s3fs",
        "s3fs.core:S3FileSystem",
        "`aws configure`, AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ("aiohttp:ClientError", "botocore.exceptions:BotoCoreError"),
        # Half a minute in total, like gcsfs; by default botocore would give up after two seconds.
        {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 8}}},
    ),
}


@dataclass(frozen=True)
class Address:
    """A file or folder in an object store, with the part of the interface of `pathlib.Path` that reading records needs.

    It can be shared by threads and sent to other processes: the libraries keep connections per process. Methods that
    read raise `UserError` if the store cannot be reached or denies access.

    Raises:
      UserError: the address does not belong to a supported store.
    """

    url: str

    def __post_init__(self) -> None:
        scheme, _, rest = self.url.partition("://")
        if scheme not in KINDS or not rest.strip("/"):
            kinds = " or ".join(f"{kind}://BUCKET/FOLDER" for kind in KINDS)
            raise UserError(f"{self.url}: not a supported address; expected {kinds}, or a path")
        object.__setattr__(self, "url", self.url.rstrip("/"))

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self.url}/{name}")

    def size(self) -> int | None:
        """Returns the size of the file in bytes; None if it does not exist."""
        try:
            with self._opened() as system:
                found = system.info(self.url)
                return found["size"] if found["type"] == "file" else None
        except FileNotFoundError:
            return None

    def read_range(self, start: int, end: int) -> bytes:
        """Reads bytes `start` to `end` by one request; the file must exist and be long enough."""
        if start == end:
            return b""
        try:
            with self._opened() as system:
                found = system.cat_file(self.url, start=start, end=end)
        except FileNotFoundError as error:
            raise UserError(f"{self.url} is gone; copy it there again") from error
        if len(found) != end - start:
            raise UserError(
                f"{self.url}: only {len(found)} of {end - start} bytes at {start} were read; copy it there again"
            )
        return found

    @contextmanager
    def open(self, mode: Literal["rb"]) -> Iterator[Any]:
        """Opens the file for sequential reading. Raises `FileNotFoundError`."""
        with self._opened() as system, system.open(self.url, mode) as file:
            yield file

    def sizes(self, below: str) -> dict[str, int]:
        """Returns the sizes in bytes of all files in a subfolder, by their names relative to this folder. Each request
        lists a thousand files."""
        with self._opened() as system:
            found = system.find(f"{self.url}/{below}", detail=True)
        root = len(self.url.partition("://")[2]) + 1
        return {path[root:]: entry["size"] for path, entry in found.items()}

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """Yields the store's file system, and converts its errors to `UserError`, except `FileNotFoundError`."""
        scheme = self.url.partition("://")[0]
        kind = KINDS[scheme]
        try:
            # There is one instance per process. Folders are listed only once, so listings are not cached.
            system = pkgutil.resolve_name(kind.system)(use_listings_cache=False, **kind.options)
        except ImportError as error:
            raise UserError(
                f"{self.url}: {kind.library}, which reads {scheme}:// addresses, cannot be imported ({error}); "
                "pip install 'vpae_jax[buckets]'"
            ) from error
        # The library would also log, with a traceback, the errors that it raises.
        logging.getLogger(kind.library).setLevel(logging.CRITICAL)
        try:
            yield system
        except FileNotFoundError:
            raise
        except (OSError, *map(pkgutil.resolve_name, kind.failures)) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{self.url}: cannot be read: {reason}; check the network and the credentials ({kind.credentials}), "
                "then run the same command again"
            ) from error


# A place that records can be read from.
Location = Path | Address
