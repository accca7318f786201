"""How clips are divided, and what chunks remember."""

import pytest

from vpae_jax.flow.chunks import Chunks
from vpae_jax.types import UserError


@pytest.mark.parametrize(
    ("chunks", "frames", "expected"),
    [
        (Chunks(), 6, ((0, 3), (3, 6))),
        (Chunks(), 3, ((0, 3),)),
        (Chunks(1), 3, ((0, 1), (1, 2), (2, 3))),
        (Chunks(2, first=1), 5, ((0, 1), (1, 3), (3, 5))),
        (Chunks(1, first=3), 5, ((0, 3), (3, 4), (4, 5))),
        (Chunks(2, first=3), 3, ((0, 3),)),
    ],
)
def test_spans(chunks, frames, expected):
    assert chunks.spans(frames) == expected


@pytest.mark.parametrize(
    ("chunks", "start", "expected"),
    [
        (Chunks(3), 0, ()),
        (Chunks(3), 6, ((0, 6, 0),)),
        (Chunks(3, window=3), 3, ((0, 3, 0),)),
        (Chunks(3, window=3), 6, ((3, 6, 0),)),
        (Chunks(2, window=3), 6, ((3, 6, 0),)),
        (Chunks(1, window=2, sink=1), 3, ((0, 3, 0),)),
        # At 4, the frames 2 and 3 are seen where they are, and frame 0 at place 1.
        (Chunks(1, window=2, sink=1), 4, ((0, 1, 1), (2, 4, 0))),
        (Chunks(3, window=3, sink=2), 9, ((0, 2, 4), (6, 9, 0))),
        (Chunks(1, first=4, window=1, sink=2), 4, ((0, 2, 1), (3, 4, 0))),
    ],
)
def test_what_a_chunk_sees_of_the_frames_before_it(chunks, start, expected):
    assert chunks.remembered(start) == expected


@pytest.mark.parametrize("chunks", [Chunks(2), Chunks(2, window=3), Chunks(2, window=3, sink=1), Chunks(1, 3, 1, 2)])
def test_a_chunk_sees_the_latest_frames_at_their_places_and_the_first_ones_directly_before(chunks):
    for start, _ in chunks.spans(12):
        runs = chunks.remembered(start)
        frames = [frame for first, last, _ in runs for frame in range(first, last)]
        standing = [frame + later for first, last, later in runs for frame in range(first, last)]
        window, sink = chunks.window or start, chunks.sink if chunks.window else 0
        assert frames == [frame for frame in range(start) if frame >= start - window or frame < sink]
        assert standing == list(range(start - len(frames), start))


@pytest.mark.parametrize(
    ("chunks", "frames", "slots"),
    [
        (Chunks(3), 21, 21),
        (Chunks(3, window=6), 21, 9),
        (Chunks(3, window=6, sink=1), 21, 10),
        (Chunks(3, window=6, sink=1), 9, 9),
        (Chunks(3, first=1, window=6), 22, 9),
        (Chunks(1, first=5, window=2, sink=1), 21, 5),
    ],
)
def test_slots_hold_what_chunks_see_and_a_chunk(chunks, frames, slots):
    assert chunks.slots(frames) == slots
    for start, stop in chunks.spans(frames):
        assert sum(last - first for first, last, _ in chunks.remembered(start)) + stop - start <= slots


@pytest.mark.parametrize(
    ("frames", "chunks", "near"),
    [
        (2, Chunks(), "not a whole number of chunks (first 3, then 3 each); make it 3, or"),
        (7, Chunks(), "make it 6, or"),
        (8, Chunks(), "make it 9, or"),
        (6, Chunks(first=1), "(first 1, then 3 each); make it 7, or"),
    ],
)
def test_a_clip_that_is_no_whole_number_of_chunks(frames, chunks, near):
    with pytest.raises(UserError) as error:
        chunks.spans(frames)
    message = str(error.value)
    assert message.startswith(f"a clip of {frames} latent frames is ") and near in message
    assert chunks.spans(int(message.split("make it ")[1].split(",")[0]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 0}, "^chunks.size is 0, expected 1 or more$"),
        ({"first": -1}, "^chunks.first is -1, expected 0 or more$"),
        ({"window": -3}, "^chunks.window is -3, expected 0 or more$"),
        ({"window": 1, "sink": -1}, "^chunks.sink is -1, expected 0 or more$"),
        ({"sink": 1}, "^chunks.sink is 1, but there is no window; set chunks.window, or sink=0$"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        Chunks(**fields)
