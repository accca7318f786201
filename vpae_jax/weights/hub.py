"""Uploads to the Hugging Face hub, which `locate.py` fetches from: what can go wrong is found before anything is made.

`HF_ENDPOINT` names another hub than huggingface.co, and the token is that of `hf auth login` or of `HF_TOKEN`.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi, constants, errors

from vpae_jax.types import UserError
from vpae_jax.weights.filenames import CONFIG, INDEX, SETTINGS
from vpae_jax.weights.locate import HUB_ID
from vpae_jax.weights.origin import CARD_FILE

# What the HTTP library of the hub's client raises where no answer comes; the client has changed libraries.
_TRANSPORT: type[Exception] = errors.HfHubHTTPError.__mro__[1]
# The client wraps what its threads raise, and takes bad answers for bad values.
_FAILURES = (_TRANSPORT, OSError, RuntimeError, ValueError)
_HIDDEN = [".*", "**/.*"]
# What a repository may hold before the first push: what the hub's own page puts there.
_EMPTY = {".gitattributes", CARD_FILE, "LICENSE"}


@dataclass(frozen=True)
class Repository:
    """A model repository of the hub that may be written to.

    Attributes:
      name: OWNER/NAME.
      files: what it holds already.
    """

    name: str
    files: frozenset[str] = frozenset()

    @property
    def url(self) -> str:
        return f"{constants.ENDPOINT}/{self.name}"


def check_name(name: str) -> str:
    """The same name. Raises `UserError` for one that is not OWNER/NAME as the hub has them."""
    match = HUB_ID.fullmatch(name)
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except errors.HFValidationError:
        match = None
    if match is None or match[2] is not None:
        raise UserError(f"--push={name}: expected OWNER/NAME of letters, digits, '-', '_' and '.', at most 96 in all")
    return name


def open_repository(name: str, private: bool = False) -> Repository:
    """A repository that may be written to; a new one is created.

    Args:
      name: OWNER/NAME.
      private: whether a new one can be seen by its owner alone. An existing one stays as it is.

    Raises:
      UserError: no token, or one that may not write there; a hub that does not answer.
    """
    check_name(name)
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--push={name}: HF_HUB_OFFLINE keeps this process from the hub; unset it")
    if huggingface_hub.get_token() is None:
        raise UserError(f"--push={name}: not logged in; run `hf auth login`, or set HF_TOKEN to a token that may write")
    api = HfApi()
    with _told(name):
        user = api.whoami()
        if _role(user) == "read":
            tokens = f"{constants.ENDPOINT}/settings/tokens"
            raise UserError(f"--push={name}: the token of {user.get('name')} may only read; make another at {tokens}")
        api.create_repo(name, private=private or None, exist_ok=True)
        # The hub says what it would do with a file only to those who may commit one.
        api.preupload_lfs_files(name, [CommitOperationAdd(CARD_FILE, b"-")])
        return Repository(name, frozenset(api.list_repo_files(name)))


def check_room(repository: Repository, written: Sequence[str], whole: bool) -> None:
    """Whether files can be put into a repository without mixing with what is there.

    A model directory takes the place of an earlier one that this package has written, and of nothing else: its
    readers would take other files for its own. LoRA files lie beside each other, but not beside a model.

    Args:
      written: files that are to be uploaded, as far as they are known; what an interrupted upload left is among them.
      whole: whether they are a model directory.

    Raises:
      UserError: files of something else are there.
    """
    if whole:
        others = set() if SETTINGS in repository.files else repository.files - _EMPTY - set(written)
    else:
        others = repository.files & {INDEX, CONFIG, SETTINGS}
    if others:
        first, more = min(others), f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            f"--push={repository.name}: already holds {first}{more}, which the upload would mix with; choose another "
            "name, or delete what is there"
        )


def files_of(folder: Path) -> list[str]:
    """The files of a folder that an upload takes: all but hidden ones."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))


def upload_folder(folder: Path, repository: Repository, what: str) -> None:
    """Uploads a model directory; what an earlier one has left is deleted.

    Args:
      what: the commit's message.

    Raises:
      UserError: the hub refuses it, or does not answer.
    """
    written = files_of(folder)
    check_room(repository, written, whole=True)
    stale = [glob.escape(name) for name in repository.files - _EMPTY - set(written)]
    with _told(repository.name):
        HfApi().upload_folder(
            repo_id=repository.name,
            folder_path=folder,
            commit_message=what,
            ignore_patterns=_HIDDEN,
            delete_patterns=stale or None,
        )


def upload_files(files: dict[str, Path | bytes], repository: Repository, what: str) -> None:
    """Uploads single files, by their names there.

    Args:
      what: the commit's message.

    Raises:
      UserError: the hub refuses it, or does not answer.
    """
    check_room(repository, list(files), whole=False)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    with _told(repository.name):
        HfApi().create_commit(repository.name, operations, commit_message=what)


def _role(user: dict[str, Any]) -> str | None:
    """What the token may do: "read", "write" or "fineGrained"; None where the hub does not say."""
    auth = user.get("auth")
    token = auth.get("accessToken") if isinstance(auth, dict) else None
    return token.get("role") if isinstance(token, dict) else None


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Tells in one line what the hub's client raises."""
    try:
        yield
    except _FAILURES as error:
        raise UserError(f"--push={name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What went wrong, from what the client raises and from what that was raised for."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, _TRANSPORT):
        cause = cause.__cause__
    if isinstance(cause, errors.HfHubHTTPError):
        status = cause.response.status_code
        said = (cause.server_message or "").strip() or _line(cause)
        if status == 401:
            return f"the token is not valid at {constants.ENDPOINT}; run `hf auth login` again, or correct HF_TOKEN"
        if status == 403:
            return f"no permission to write there ({_one_line(said)}); use a token that may, or another OWNER"
        return f"the hub says {status}: {_one_line(said)}"
    if cause is not None:
        return f"{constants.ENDPOINT} cannot be reached ({_line(cause)}); is there a network?"
    return _line(error)


def _line(error: BaseException) -> str:
    return _one_line(str(error)) or type(error).__name__


def _one_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
