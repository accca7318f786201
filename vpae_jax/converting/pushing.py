"""What `convert --push` adds to a conversion: the model on the Hugging Face hub.

The hub is asked before anything is computed. A destination that is there already is uploaded as it is, provided that
the same command has written it: so the same command, given again, makes up for an upload that failed.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vpae_jax.run.guard import compared_scores
from vpae_jax.run.previews import latest_previews
from vpae_jax.runtime.progress import working
from vpae_jax.types import UserError
from vpae_jax.weights.card import SAMPLES, Provenance
from vpae_jax.weights.comfyui import SUFFIX
from vpae_jax.weights.filenames import read_bytes
from vpae_jax.weights.find import is_workdir
from vpae_jax.weights.hub import Repository, check_room, files_of, open_repository, upload_files, upload_folder
from vpae_jax.weights.lora_card import BASE, COMMAND, lora_card, read_metadata
from vpae_jax.weights.origin import CARD_FILE, Origin, origin_of

# Options that do not change what is written.
_FREE = re.compile(r"--(push(=.*)?|private|verify)")


def recorded(argv: Sequence[str]) -> str:
    """The command that a conversion leaves in what it writes."""
    kept, words = [], iter(argv)
    for word in words:
        if _FREE.fullmatch(word) is None:
            kept.append(word)
        elif word == "--push":
            next(words, None)
    return shlex.join(["python", "-m", "vpae_jax.convert", *kept])


def written_by(target: Path, command: str) -> bool:
    """Whether a command has written a folder or file. Both appear whole or not at all.

    Raises:
      UserError: a file that cannot be read.
    """
    if target.is_dir():
        card = target / CARD_FILE
        return card.is_file() and f"| {COMMAND} | {command} |" in read_bytes(card).decode("utf-8", "replace").split(
            "\n"
        )
    return target.is_file() and read_metadata(target).get(COMMAND) == command


@dataclass(frozen=True)
class Push:
    """An upload that the hub will take.

    Attributes:
      repository: where to.
      source: what is converted.
      target: the folder or file that it becomes.
      done: whether that is there already.
    """

    repository: Repository
    source: str
    target: Path
    done: bool

    def upload(self) -> None:
        """Uploads the target.

        Raises:
          UserError: the hub does not take it. The target stays.
        """
        try:
            with working(f"uploading {self.target} to {self.repository.url}"):
                if self.target.is_dir():
                    upload_folder(self.target, self.repository, "Model written by vpae_jax.convert")
                else:
                    self._upload_lora()
        except UserError as error:
            raise UserError(
                f"{error}; {self.target} is complete, and the same command uploads it without converting again"
            ) from error

    def _upload_lora(self) -> None:
        metadata, workflow = read_metadata(self.target), self.target.with_suffix(SUFFIX)
        provenance, base = Provenance(self.source), metadata.get(BASE, "")
        if is_workdir(workdir := Path(self.source)):
            provenance = Provenance(self.source, {}, compared_scores(workdir), samples=latest_previews(workdir))
        origin: Origin = origin_of(base, Path(base) if Path(base).is_dir() else None)
        provenance = dataclasses.replace(provenance, origin=origin)
        with_workflow = workflow.name if workflow.is_file() else None
        card = lora_card(self.target, metadata, provenance, with_workflow)
        files: dict[str, Path | bytes] = {self.target.name: self.target, CARD_FILE: card.encode()}
        files |= {} if with_workflow is None else {workflow.name: workflow}
        files |= {f"{SAMPLES}/{path.name}": path for path in provenance.samples}
        upload_files(files, self.repository, "LoRA written by vpae_jax.convert")


def prepare(name: str, private: bool, source: str, target: Path, whole: bool) -> Push:
    """Sees to it that the hub will take an upload, before there is anything to upload.

    Args:
      name: OWNER/NAME.
      private: whether a new repository is.
      target: what is to be uploaded, whether or not it is there already.
      whole: whether that is a model directory.

    Raises:
      UserError: the hub will not.
    """
    repository, done = open_repository(name, private), target.exists()
    check_room(repository, files_of(target) if done and whole else [], whole)
    return Push(repository, source, target, done)
