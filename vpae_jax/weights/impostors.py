"""What lies in the place of a file that was to be fetched: known by its first bytes."""

from __future__ import annotations

import re

HEAD = 512  # bytes that tell

_KINDS = (
    (
        rb"version https://git-lfs",
        "is a Git LFS pointer, which only stands for the file; run `git lfs pull` where it came from",
    ),
    (
        rb"(?i)\s*(?:<!--.*?-->\s*)?<(?:!doctype\s+html|html|head|body)\b",
        "is a web page (HTML), as sites send for a file that is not there or needs a login; fetch the file itself",
    ),
    (rb"\s*<(?:\?xml|Error)\b", "is XML, as stores send in place of a file that they refuse; fetch the file itself"),
    (rb"GGUF", "is a GGUF file, whose weights are quantised; fetch safetensors of float8 or wider"),
    (
        rb"\x1f\x8b|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd|BZh\d|.{257}ustar",
        "is an archive; unpack it, and name what it held",
    ),
    (rb"\x89HDF\r\n", "is an HDF5 file; expected safetensors or a PyTorch checkpoint"),
    (rb"\x93NUMPY", "is a NumPy array; expected safetensors or a PyTorch checkpoint"),
)
_KNOWN = tuple((re.compile(pattern, re.DOTALL), what) for pattern, what in _KINDS)


def impostor(head: bytes) -> str | None:
    """What a file is that begins so, and what to do; None for one that may be what it was taken for.

    Args:
      head: its first `HEAD` bytes, or all of a shorter one.
    """
    head = head.removeprefix(b"\xef\xbb\xbf")
    return next((what for pattern, what in _KNOWN if pattern.match(head)), None)
