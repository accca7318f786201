"""Files in object stores, by address: gs://bucket/folder and s3://bucket/folder.

gcsfs and s3fs read them. They are installed apart (`pip install 'vpae_jax[buckets]'`), find credentials, proxies and
endpoints as those stores' own tools do, and try again by themselves what may pass. What they give up is a `UserError`:
it says nothing of what is stored, so it must end a run, not change what is trained on.
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
      library: what reads it.
      system: its file system; of gcsfs the plain one, since that of `gcsfs` asks for a bucket's layout at every read
        when it may not see it.
      credentials: where these come from, for messages.
      failures: what the library raises besides `OSError`.
      options: what it is told, besides what its users set for all programs.
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
            "builtins:ValueError",  # a request that the server calls bad
        ),
    ),
    "s3": _Kind(
        "s3fs",
        "s3fs.core:S3FileSystem",
        "`aws configure`, AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ("aiohttp:ClientError", "botocore.exceptions:BotoCoreError"),
        # Half a minute in all, as gcsfs tries; botocore alone would give up after two seconds.
        {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 8}}},
    ),
}


@dataclass(frozen=True)
class Address:
    """A file or folder in an object store, with what reading records needs of `pathlib.Path`.

    Threads may share it, and it may be sent to processes: the libraries keep connections, one set a process. Methods
    that read raise `UserError` when the store cannot be reached or does not allow it.

    Raises:
      UserError: no address of a store that can be read.
    """

    url: str

    def __post_init__(self) -> None:
        scheme, _, rest = self.url.partition("://")
        if scheme not in KINDS or not rest.strip("/"):
            kinds = " or ".join(f"{kind}://BUCKET/FOLDER" for kind in KINDS)
            raise UserError(f"{self.url}: not an address that can be read; expected {kinds}, or a path")
        object.__setattr__(self, "url", self.url.rstrip("/"))

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self.url}/{name}")

    def size(self) -> int | None:
        """Bytes of the file; None when there is none."""
        try:
            with self._opened() as system:
                found = system.info(self.url)
                return found["size"] if found["type"] == "file" else None
        except FileNotFoundError:
            return None

    def read_range(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end` of a file that is known to be there and to have them, by one request."""
        if start == end:
            return b""
        try:
            with self._opened() as system:
                found = system.cat_file(self.url, start=start, end=end)
        except FileNotFoundError as error:
            raise UserError(f"{self.url} is gone; copy it there again") from error
        if len(found) != end - start:
            raise UserError(f"{self.url}: {len(found)} of {end - start} bytes at {start} came; copy it there again")
        return found

    @contextmanager
    def open(self, mode: Literal["rb"]) -> Iterator[Any]:
        """The file, to be read from its beginning to its end. Raises `FileNotFoundError`."""
        with self._opened() as system, system.open(self.url, mode) as file:
            yield file

    def sizes(self, below: str) -> dict[str, int]:
        """Bytes of all files in a folder of this one, by their names from here on. One request lists a thousand."""
        with self._opened() as system:
            found = system.find(f"{self.url}/{below}", detail=True)
        root = len(self.url.partition("://")[2]) + 1
        return {path[root:]: entry["size"] for path, entry in found.items()}

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        """The store; what it gives up becomes a `UserError`, but for `FileNotFoundError`."""
        scheme = self.url.partition("://")[0]
        kind = KINDS[scheme]
        try:
            # There is one in each process. What is listed is listed once, so that nothing is kept of it.
            system = pkgutil.resolve_name(kind.system)(use_listings_cache=False, **kind.options)
        except ImportError as error:
            raise UserError(
                f"{self.url}: {kind.library}, which reads {scheme}:// addresses, cannot be imported ({error}); "
                "pip install 'vpae_jax[buckets]'"
            ) from error
        # It logs with a traceback what it raises.
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


# Where records are read from.
Location = Path | Address
