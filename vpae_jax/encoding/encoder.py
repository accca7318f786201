"""Encodes clips into records: clips are decoded ahead, grouped by size, encoded in batches and written unit by unit.

    identity = describe(source, encoders)
    encode(source, encoders, Units(folder, identity, source.units))

Each device of this process has a copy of the encoders and encodes its own batches. Processes divide the units and do
not communicate: any of them may be killed, or join later. The one that finishes the last unit completes the folder.
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
    """A clip, or something that a clip is made from."""

    @property
    def id(self) -> str: ...
    @property
    def caption(self) -> str: ...


C = TypeVar("C", bound=Captioned)
# Clips per unit that the summary may show, each of a different video.
SHOWN = 12
# Pixels of the longer side of a frame in the summary.
SHOWN_SIDE = 160
LONGEST = 300  # characters of a caption in the summary
NOT_FINITE = "not finite"  # kind of reject
# If this many clips in a row are not finite and their unit has no others, the model is to blame, and encoding stops.
BROKEN = 4
# Measurements that the summary uses, if present.
MEASURED = ("motion", "brightness", "black", "start", "fps", "seed")


@runtime_checkable
class Encoders(Protocol):
    """The part of `vpae_jax.inference.pipeline.Pipeline` that is used here."""

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
    """A clip, or a prompt alone, as stored in its record.

    Attributes:
      id: unique in its source.
      arrays: see `UnitWriter.add`.
      about: plain JSON with the caption and, for a prompt alone, `num_frames`, `height` and `width`.
      video: frames for the summary; for a prompt alone its first frame, if given.
      size: for a prompt alone, [f, h, w, c] of the latents to generate.
    """

    id: str
    arrays: Mapping[str, Shaped[np.ndarray, "..."]]
    about: Mapping[str, Any]
    video: UInt8[np.ndarray, "t height width 3"] | None
    size: LatentShape | None = None


def describe(source: ClipSource, encoders: Encoders) -> dict[str, Any]:
    """Returns everything that determines the records: the identity of their folder."""
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
      source: the clips.
      encoders: a pipeline.
      units: the folder; its identity must be that of `describe`.
      batch_size: clips that a device encodes at once.
      process, processes: index of this process, and number of processes that divide the units.
      devices: by default all of this process.

    Returns:
      Whether all units are done (by any process) and the folder can be read.
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
    """Encodes all clips into a folder below `root`, named after a hash of their identity. All processes of a run must
    call this; each encodes its share.

    Returns:
      The complete folder.

    Raises:
      UserError: as `encode`, or another process did not get this far.
    """
    identity = describe(source, encoders)
    folder = root / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    units = Units(folder, identity, source.units)
    if not units.complete():  # also if a shard was lost later
        encode(source, encoders, units, batch_size, jax.process_index(), jax.process_count())
    wait_for_all("encoded")
    return folder


def on_devices(encode: Callable[..., R], encoders: Encoders, devices: Sequence[Any] | None) -> list[Callable[..., R]]:
    """Binds `encode` to a copy of the encoders on each device, by default on all devices of this process."""
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
    """Encodes pending units, and completes the folder once all units are done (by any process).

    Args:
      units: the folder.
      encoders: a pipeline.
      pending: numbers of the units to encode.
      read: yields their items in a fixed order, and None after each unit.
      runs: creates the functions that encode a batch; called only if something is pending.
      batch_size, size, expected, what: see `write_units`.

    Returns:
      Whether all units are done.

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
    """Encodes units in batches of items of one unit and one size, and writes each unit while the next is encoded.

    Args:
      units: the folder.
      pending: numbers of the units.
      items: the items of these units in a fixed order, with None after each unit.
      runs: functions that encode a batch; each is called in its own thread, one batch after the other.
      batch_size: items per batch; the last ones of a unit may be fewer.
      size: a key that all items of a batch have in common.
      expected: returns the number of items in a unit, or None if unknown.
      what: what an item is called in messages.

    Raises:
      UserError: the units cannot be written, or all of several encoded items in a row are not finite.
    """
    with ExitStack() as stack:
        threads = []
        for run in runs:
            thread = ThreadPoolExecutor(1)
            stack.callback(thread.shutdown, cancel_futures=True)
            threads.append((thread, run))
        progress = stack.enter_context(Progress([expected(unit) for unit in pending], what))
        encoded = _in_batches(items, threads, batch_size, size)
        spoilt: list[Reject] = []  # non-finite clips since the last finite one
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
                    raise UserError(f"none of the last {len(spoilt)} clips is finite: {spoilt[-1].reason}")
            progress.end_of_unit()


def _write(writer: UnitWriter, item: Encoded | Reject, shown: list[Any]) -> Reject | None:
    """Adds a clip and its notes for the summary, or else records a reject, which is returned."""
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
    """Yields encoded items in the order in which batches were filled, rejects between them, and None after each unit.

    Each thread has work queued, from the next unit if this one has no more. Nothing is queued from the unit after that,
    so that the queue does not grow when there is little to encode.
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
        """Yields finished results in order; waits while the queue holds more batches or units than given."""
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
    """Yields the items, and on a read error a future that raises it, so that earlier items are still processed."""
    try:
        yield from items
    except (OSError, UserError) as error:
        failed: Future[Any] = Future()
        failed.set_exception(error)
        yield failed


def _encode(clips: list[Clip], encoders: Encoders, batch_size: int) -> list[Encoded]:
    """Encodes clips of one size. The batch is padded to `batch_size`, so that a single compiled program suffices."""
    padded = [clips[min(i, len(clips) - 1)] for i in range(batch_size)]
    video = np.stack([clip.video for clip in padded])
    _, t, height, width, _ = video.shape
    pictures = video[:, 0] if encoders.takes_image else None
    latents = encode_video(encoders.vae, video)
    condition = encoders.condition([clip.caption for clip in padded], pictures, t, height, width)
    arrays = arrays_of(latents, condition)
    result = []
    for row, clip in enumerate(clips):
        about = {**clip.about, "caption": clip.caption}  # overrides a column of that name
        result.append(Encoded(clip.id, {name: x[row] for name, x in arrays.items()}, about, clip.video))
    return result


def too_long(encoders: Encoders, caption: str) -> Refusal | None:
    """Returns why a caption is rejected if it has more tokens than the text encoder reads; else None."""
    try:
        encoders.tokenize([caption])
    except TooLong as error:
        return "caption", f"has {error.tokens} tokens; the text encoder reads at most {error.limit}"
    return None


def fitting(items: Iterable[C | Reject | None], encoders: Encoders) -> Iterator[C | Reject | None]:
    """Yields the items, with those whose captions are too long replaced by rejects."""
    for item in items:
        refusal = None if item is None or isinstance(item, Reject) else too_long(encoders, item.caption)
        yield item if item is None or refusal is None else Reject(item.id, *refusal)


def arrays_of(latents: Any, condition: Any) -> dict[str, np.ndarray]:
    """Returns a batch's latents (if any) and conditions on the host, by the names used in records."""
    arrays = {
        "latents": latents,
        "text": condition.text,
        "text_mask": condition.text_mask,
        "image": condition.image,
        "frames": condition.frames,
    }
    return {name: np.asarray(value) for name, value in arrays.items() if value is not None}


def note(item: Encoded, shown: bool) -> dict[str, Any]:
    """Returns what `encoding.summary` needs to know about a clip: its measurements, and an image if it is shown."""
    kept: dict[str, Any] = {name: item.about[name] for name in MEASURED if name in item.about}
    if shown:
        kept |= {"shown": True} if item.video is None else {"picture": strip(item.video)}
    if item.video is None or item.size is not None:
        size = [item.about[name] for name in ("num_frames", "height", "width")]
    else:
        size = list(item.video.shape)
    return {"id": item.id, "caption": item.about["caption"][:LONGEST], "size": size, **kept}


def strip(video: UInt8[np.ndarray, "t height width 3"]) -> str:
    """Returns a clip's first, middle and last frame side by side (or its only frame), encoded by `pages.jpeg`."""
    frames = [Image.fromarray(video[i]) for i in sorted({0, len(video) // 2, len(video) - 1})]
    for frame in frames:
        frame.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    width, height = frames[0].size
    sheet = Image.new("RGB", (len(frames) * (width + 2) - 2, height), "white")
    for i, frame in enumerate(frames):
        sheet.paste(frame, (i * (width + 2), 0))
    return jpeg(np.asarray(sheet))


def fingerprint(encoders: Encoders) -> str:
    """Returns a hash (16 hexadecimal digits) of the encoders' configs and weights, the tokenizer's vocabulary, the
    image preprocessing and the negative prompt.

    Weights are hashed as bfloat16, so that a model has the same fingerprint whatever dtype it is loaded in. Weights
    that were not loaded are read from their files, one at a time.
    """
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
    """Adds a model's config and its weights, as bfloat16, to a `hashlib` digest.

    Args:
      directory, part: where to read weights of which the model only has the shapes.
    """
    digest.update(repr(model.config).encode())
    leaves = jax.tree_util.tree_flatten_with_path(nnx.split(model, nnx.Param, ...)[1])[0]
    with ExitStack() as stack:
        read = None
        for path, value in leaves:
            if isinstance(value, jax.ShapeDtypeStruct):
                if read is None:
                    assert directory is not None  # set by `load_pipeline`
                    read = stack.enter_context(open_parameters(directory, part, ml_dtypes.bfloat16))
                value = read(param_path(path))
            host = np.asarray(value).astype(ml_dtypes.bfloat16)
            digest.update(f"{jax.tree_util.keystr(path)} {host.shape}".encode())
            digest.update(host.tobytes())


def dtype_of(model: Any) -> str:
    """Returns the name of the dtype of a model's weights, which is also its compute dtype in `load_pipeline`."""
    return str(jax.tree.leaves(nnx.state(model, nnx.Param))[0].dtype)


def encode_video(vae: nnx.Module, video: UInt8[np.ndarray, "b t height width 3"]) -> Latents:
    """Encodes pixels in 0..255 with `vae.encode`, compiled."""
    return _encode_video(*nnx.split(vae), video)


@partial(jax.jit, static_argnums=0)
def _encode_video(graph: nnx.GraphDef, weights: nnx.State, video: Any) -> Latents:
    return nnx.merge(graph, weights).encode(video.astype(jnp.float32) / 127.5 - 1)
