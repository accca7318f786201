"""From clips to records: decoded ahead, brought together by size, encoded in batches, written unit by unit.

    identity = describe(source, encoders)
    encode(source, encoders, Units(folder, identity, source.units))

Each device of this process has a copy of the encoders and encodes batches of its own. Processes share the units and
know nothing of each other: any of them may be killed, or join later. The one that ends the last unit makes the folder
whole.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jaxtyping import Shaped, UInt8
from PIL import Image

from vpae_jax.data.records import LatentShape, NotFinite
from vpae_jax.encoding.clip_source import Clip, ClipSource, Reject
from vpae_jax.encoding.filters import Refusal
from vpae_jax.encoding.progress import Progress
from vpae_jax.encoding.unit_writer import UnitWriter
from vpae_jax.encoding.units import Units
from vpae_jax.inference.tokenizer import TooLong
from vpae_jax.pages import jpeg
from vpae_jax.runtime.processes import wait_for_all
from vpae_jax.sharding import param_path
from vpae_jax.types import Latents, UserError
from vpae_jax.weights.directory import ModelDirectory
from vpae_jax.weights.loading import open_parameters

T = TypeVar("T")
R = TypeVar("R")


@runtime_checkable
class Captioned(Protocol):
    """A clip, or what becomes one."""

    @property
    def id(self) -> str: ...
    @property
    def caption(self) -> str: ...


C = TypeVar("C", bound=Captioned)
# Of each unit, so many clips are shown in the summary, each of another video.
SHOWN = 12
# Pixels of the longer side of a frame there.
SHOWN_SIDE = 160
LONGEST = 300  # characters of a caption
NOT_FINITE = "not finite"  # kind of reject
# A unit of no other clips is not written when so many came one after the other: the model is to blame, not the clips.
BROKEN = 4
# What it knows of every clip, where it was measured.
MEASURED = ("motion", "brightness", "black", "start", "fps", "seed")


@runtime_checkable
class Encoders(Protocol):
    """What of `vpae_jax.inference.pipeline.Pipeline` is used here."""

    @property
    def vae(self) -> Any: ...
    @property
    def text_encoder(self) -> Any: ...
    @property
    def image_encoder(self) -> Any: ...
    @property
    def image_processor(self) -> Any: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def defaults(self) -> Any: ...
    @property
    def directory(self) -> Any: ...
    @property
    def takes_image(self) -> bool: ...
    def tokenize(self, prompts: Sequence[str]) -> Any: ...
    def encode_prompt(self, prompts: Sequence[str]) -> Any: ...
    def condition(
        self, prompts: Sequence[str], pictures: Any, num_frames: int | None, height: int | None, width: int | None
    ) -> Any: ...
    def on(self, device: Any) -> Any: ...


@dataclass(frozen=True)
class Encoded:
    """A clip, or a prompt alone, as its record keeps it.

    Attributes:
      id: unique in its source.
      arrays: see `UnitWriter.add`.
      about: plain JSON; the caption is in it, and of a prompt alone `num_frames`, `height` and `width`.
      video: what it shows, for the summary; of a prompt alone the first frame that is given, if any.
      size: [f, h, w, c] of the latents that are to be made, of a prompt alone.
    """

    id: str
    arrays: Mapping[str, Shaped[np.ndarray, "..."]]
    about: Mapping[str, Any]
    video: UInt8[np.ndarray, "t height width 3"] | None
    size: LatentShape | None = None


def describe(source: ClipSource, encoders: Encoders) -> dict[str, Any]:
    """What decides the records: the identity of their folder."""
    return {"source": source.identity, "encoders": fingerprint(encoders), "dtype": dtype_of(encoders.text_encoder)}


def encode(
    source: ClipSource,
    encoders: Encoders,
    units: Units,
    batch_size: int = 1,
    process: int = 0,
    processes: int = 1,
    devices: Sequence[Any] | None = None,
) -> bool:
    """Encodes this process's share of the units that are not done yet.

    Args:
      source: clips.
      encoders: a pipeline.
      units: the folder; its identity is `describe`'s.
      batch_size: clips that a device encodes at once.
      process, processes: which share.
      devices: this process's by default.

    Returns:
      Whether all units are done, by whomever, and the folder can be read.
    """
    return fill(
        units,
        encoders,
        units.pending(process, processes),
        source.read,
        lambda: on_devices(partial(_encode, batch_size=batch_size), encoders, devices),
        batch_size,
        size=lambda clip: clip.video.shape,
        expected=source.expected,
    )


def encode_into(root: Path, source: ClipSource, encoders: Encoders, batch_size: int) -> Path:
    """Encodes all clips into a folder of `root` that is named by what decides them. Of several processes all call this,
    and each encodes its share.

    Returns:
      The folder, complete.

    Raises:
      UserError: as `encode`; the other processes did not come so far.
    """
    identity = describe(source, encoders)
    folder = root / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    units = Units(folder, identity, source.units)
    if not units.complete():  # a shard that was lost since is made again
        encode(source, encoders, units, batch_size, jax.process_index(), jax.process_count())
    wait_for_all("encoded")
    return folder


def on_devices(encode: Callable[..., R], encoders: Encoders, devices: Sequence[Any] | None) -> list[Callable[..., R]]:
    """`encode` with a copy of the encoders on each of these devices, by default all of this process."""
    return [partial(encode, encoders=encoders.on(device)) for device in devices or jax.local_devices()]


def fill(
    units: Units,
    encoders: Encoders,
    pending: Sequence[int],
    read: Callable[[Sequence[int]], Iterable[C | Reject | None]],
    runs: Callable[[], Sequence[Callable[[list[C]], list[Encoded]]]],
    batch_size: int,
    size: Callable[[C], Hashable],
    expected: Callable[[int], int | None],
    what: str = "clip",
) -> bool:
    """Encodes units that are not done, and makes the folder readable once all are, by whomever; returns whether they
    are.

    Args:
      units: where to.
      encoders: a pipeline.
      pending: which units.
      read: their items in a fixed order, None after each unit.
      runs: makes what encodes a batch, if there is any.
      batch_size, size, expected, what: see `write_units`.

    Raises:
      UserError: as `write_units`.
    """
    if pending:
        write_units(units, pending, fitting(read(pending), encoders), runs(), batch_size, size, expected, what)
    text, mask = encoders.encode_prompt([encoders.defaults.negative_prompt])
    null = {"text": np.asarray(text[0], np.float32), "text_mask": np.asarray(mask[0])}
    return units.finish(null, {"text_tokens": int(mask.shape[1]), "takes_image": encoders.takes_image})


def write_units(
    units: Units,
    pending: Sequence[int],
    items: Iterable[T | Reject | None],
    runs: Sequence[Callable[[list[T]], list[Encoded]]],
    batch_size: int,
    size: Callable[[T], Hashable],
    expected: Callable[[int], int | None],
    what: str = "clip",
) -> None:
    """Encodes units in batches of items of one unit and one size, and writes them, each while the next is encoded.

    Args:
      units: where to.
      pending: which.
      items: of these in a fixed order, None after each unit.
      runs: encode a batch; each is called by a thread of its own, one batch after the other.
      batch_size: items of a batch; the last ones of a unit may be fewer.
      size: what the items of a batch have in common.
      expected: how many items a unit has, if that is known.
      what: an item becomes, for people.

    Raises:
      UserError: the units cannot be written, or hardly anything that is encoded is finite.
    """
    with ExitStack() as stack:
        threads = []
        for run in runs:
            thread = ThreadPoolExecutor(1)
            stack.callback(thread.shutdown, cancel_futures=True)
            threads.append((thread, run))
        progress = stack.enter_context(Progress([expected(unit) for unit in pending], what))
        encoded = _in_batches(items, threads, batch_size, size)
        spoilt: list[Reject] = []  # clips since the last one that was finite
        for unit in pending:
            with units.write(unit) as writer:
                shown: list[Any] = []
                for item in encoded:
                    if item is None:
                        break
                    refusal = _write(writer, item, shown)
                    if refusal is None:
                        spoilt.clear()
                    elif refusal.kind == NOT_FINITE:
                        spoilt.append(refusal)
                    progress.advance(refusal is None)
                else:
                    raise ValueError(f"unit {unit} has no end")
                if len(spoilt) >= BROKEN and not writer.clips:
                    raise UserError(f"none of the last {len(spoilt)} clips is finite; {spoilt[-1].reason}")
            progress.end_of_unit()


def _write(writer: UnitWriter, item: Encoded | Reject, shown: list[Any]) -> Reject | None:
    """Adds a clip and what the summary shows of it, or lists why there is none, which is returned."""
    if isinstance(item, Encoded):
        try:
            writer.add(item.id, item.arrays, item.about, item.size)
        except NotFinite as error:
            item = Reject(item.id, NOT_FINITE, str(error))
        else:
            show = len(shown) < SHOWN and item.about.get("video") not in shown
            writer.note(note(item, show))
            shown += [item.about.get("video", len(shown))] if show else []
            return None
    writer.reject(item)
    return item


def _in_batches(
    items: Iterable[T | Reject | None],
    threads: Sequence[tuple[ThreadPoolExecutor, Callable[[list[T]], list[Encoded]]]],
    batch_size: int,
    size: Callable[[T], Hashable],
) -> Iterator[Encoded | Reject | None]:
    """What is encoded, in the order in which batches were filled, rejects between them, and None after each unit.

    Each thread has work waiting, of the next unit when there is no more of this one; of that after it there is not,
    so that what waits does not grow when little is encoded.
    """
    filling: dict[Hashable, list[T]] = {}
    queue: deque[Future[list[Encoded]] | Reject | None] = deque()
    turns, flying, ends = cycle(threads), 0, 0  # batches and ends of units in the queue

    def start(batch: list[T]) -> None:
        nonlocal flying
        thread, run = next(turns)
        queue.append(thread.submit(run, batch))
        flying += 1

    def come(batches: int, units: int) -> Iterator[Encoded | Reject | None]:
        """What has come in its turn; waits while there are more in the queue than these."""
        nonlocal flying, ends
        while queue:
            head = queue[0]
            if isinstance(head, Future) and not head.done() and flying <= batches and ends <= units:
                return
            queue.popleft()
            if isinstance(head, Future):
                flying -= 1
                yield from head.result()
            else:
                ends -= head is None
                yield head

    for item in _failing_in_turn(items):
        if item is None:
            for batch in filling.values():
                start(batch)
            filling.clear()
            queue.append(None)
            ends += 1
        elif isinstance(item, Reject | Future):
            queue.append(item)
            flying += isinstance(item, Future)
        else:
            batch = filling.setdefault(size(item), [])
            batch.append(item)
            if len(batch) == batch_size:
                start(filling.pop(size(item)))
        yield from come(2 * len(threads), 1)
    yield from come(0, 0)


def _failing_in_turn(items: Iterable[T]) -> Iterator[T | Future[Any]]:
    """The items, and a future of why there are no more: what comes before a failure to read is not lost to it."""
    try:
        yield from items
    except (OSError, UserError) as error:
        failed: Future[Any] = Future()
        failed.set_exception(error)
        yield failed


def _encode(clips: list[Clip], encoders: Encoders, batch_size: int) -> list[Encoded]:
    """Encodes clips of one size. The batch is filled up to `batch_size`, so that one program serves all."""
    padded = [clips[min(i, len(clips) - 1)] for i in range(batch_size)]
    video = np.stack([clip.video for clip in padded])
    _, t, height, width, _ = video.shape
    pictures = video[:, 0] if encoders.takes_image else None
    latents = encode_video(encoders.vae, video)
    condition = encoders.condition([clip.caption for clip in padded], pictures, t, height, width)
    arrays = arrays_of(latents, condition)
    result = []
    for row, clip in enumerate(clips):
        about = {**clip.about, "caption": clip.caption}  # a column of that name may be another
        result.append(Encoded(clip.id, {name: x[row] for name, x in arrays.items()}, about, clip.video))
    return result


def too_long(encoders: Encoders, caption: str) -> Refusal | None:
    """Why a caption is not used that has more tokens than the text encoder reads."""
    try:
        encoders.tokenize([caption])
    except TooLong as error:
        return "caption", f"{error.tokens} tokens, the text encoder reads at most {error.limit}"
    return None


def fitting(items: Iterable[C | Reject | None], encoders: Encoders) -> Iterator[C | Reject | None]:
    """The items; those whose captions are too long as rejects."""
    for item in items:
        refusal = None if item is None or isinstance(item, Reject) else too_long(encoders, item.caption)
        yield item if item is None or refusal is None else Reject(item.id, *refusal)


def arrays_of(latents: Any, condition: Any) -> dict[str, np.ndarray]:
    """A batch's latents, if any, and conditions on the host, by the names that records have for them."""
    arrays = {
        "latents": latents,
        "text": condition.text,
        "text_mask": condition.text_mask,
        "image": condition.image,
        "frames": condition.frames,
    }
    return {name: np.asarray(value) for name, value in arrays.items() if value is not None}


def note(item: Encoded, shown: bool) -> dict[str, Any]:
    """What `encoding.summary` knows of a clip: a picture of some, and what was measured."""
    kept: dict[str, Any] = {name: item.about[name] for name in MEASURED if name in item.about}
    if shown:
        kept |= {"shown": True} if item.video is None else {"picture": strip(item.video)}
    if item.video is None or item.size is not None:
        size = [item.about[name] for name in ("num_frames", "height", "width")]
    else:
        size = list(item.video.shape)
    return {"id": item.id, "caption": item.about["caption"][:LONGEST], "size": size, **kept}


def strip(video: UInt8[np.ndarray, "t height width 3"]) -> str:
    """A clip's first, middle and last frame side by side, or its only one, as `pages.jpeg` makes it."""
    frames = [Image.fromarray(video[i]) for i in sorted({0, len(video) // 2, len(video) - 1})]
    for frame in frames:
        frame.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    width, height = frames[0].size
    sheet = Image.new("RGB", (len(frames) * (width + 2) - 2, height), "white")
    for i, frame in enumerate(frames):
        sheet.paste(frame, (i * (width + 2), 0))
    return jpeg(np.asarray(sheet))


def fingerprint(encoders: Encoders) -> str:
    """16 hexadecimal digits of the encoders' configs and weights, the tokenizer's pieces, the image preparation and the
    negative prompt. Weights are compared as bfloat16, so that one model has one print whatever it is loaded as; those
    that were left in their files are read from there, one after the other."""
    digest = hashlib.sha256()
    models = {part: getattr(encoders, part) for part in ("vae", "text_encoder", "image_encoder")}
    for part, model in models.items():
        if model is not None:
            add_weights(digest, model, encoders.directory, part)
    tokenizer = encoders.tokenizer
    digest.update(repr((sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length)).encode())
    digest.update(repr((encoders.image_processor, encoders.defaults.negative_prompt)).encode())
    return digest.hexdigest()[:16]


def add_weights(digest: Any, model: Any, directory: ModelDirectory | None = None, part: str = "") -> None:
    """Takes a model's config and weights, as bfloat16, into a `hashlib` digest.

    Args:
      directory, part: where weights are of which the model has the shapes alone.
    """
    digest.update(repr(model.config).encode())
    leaves = jax.tree_util.tree_flatten_with_path(nnx.split(model, nnx.Param, ...)[1])[0]
    with ExitStack() as stack:
        read = None
        for path, value in leaves:
            if isinstance(value, jax.ShapeDtypeStruct):
                if read is None:
                    assert directory is not None  # `load_pipeline` knows it
                    read = stack.enter_context(open_parameters(directory, part, ml_dtypes.bfloat16))
                value = read(param_path(path))
            host = np.asarray(value).astype(ml_dtypes.bfloat16)
            digest.update(f"{jax.tree_util.keystr(path)} {host.shape}".encode())
            digest.update(host.tobytes())


def dtype_of(model: Any) -> str:
    """The name of the dtype that a model's weights are in, and that it computes in as `load_pipeline` makes it."""
    return str(jax.tree.leaves(nnx.state(model, nnx.Param))[0].dtype)


def encode_video(vae: nnx.Module, video: UInt8[np.ndarray, "b t height width 3"]) -> Latents:
    """`vae.encode` of pixels 0..255, compiled."""
    return _encode_video(*nnx.split(vae), video)


@partial(jax.jit, static_argnums=0)
def _encode_video(graph: nnx.GraphDef, weights: nnx.State, video: Any) -> Latents:
    return nnx.merge(graph, weights).encode(video.astype(jnp.float32) / 127.5 - 1)
