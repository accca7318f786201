"""What TensorBoard's files hold."""

import struct

from tensorboardX.proto.event_pb2 import Event


def events(folder):
    """All events of a run's files, of each file in turn."""
    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        raw = file.read_bytes()
        while raw:
            (size,) = struct.unpack("<Q", raw[:8])
            found.append(Event.FromString(raw[12 : 12 + size]))
            raw = raw[16 + size :]
    return found


def scalars(folder):
    """(step, name, value) of each scalar."""
    return [(event.step, one.tag, one.simple_value) for event in events(folder) for one in event.summary.value]
