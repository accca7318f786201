"""Records in object stores give the same batches as in a folder; what a store refuses is one line and ends the run."""

import json
import pickle
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from absl import flags
from object_stores import HOST, S3, BadNetwork, google
from record_files import SMALL, WIDE, write_fitting, write_folder
from s3fs.core import S3FileSystem

from vpae_jax import encode
from vpae_jax.config import parse
from vpae_jax.configs import phase1
from vpae_jax.data import stores
from vpae_jax.data.batches import latent_batches
from vpae_jax.data.records import LatentRecords
from vpae_jax.data.stores import Address
from vpae_jax.inference.loading import load_pipeline
from vpae_jax.tasks.video.sources import open_sources
from vpae_jax.types import UserError

SIZE = 4
LARGE = (3, 40, 40, 16)  # over several blocks of a file
CLIPS = [[(n, (LARGE, WIDE, SMALL)[n % 3]) for n in range(first, first + 6)] for first in (0, 6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("records") / "folder", CLIPS)


@pytest.fixture(scope="module")
def s3():
    with pytest.MonkeyPatch.context() as patch:
        server = S3(patch)
        yield server
        server.stop()


@pytest.fixture(scope="module")
def address(s3, folder):
    return s3.put(folder, "records")


@pytest.fixture
def one_try(monkeypatch):
    """Stores that are not asked again for half a minute."""
    once = {"config_kwargs": {"retries": {"mode": "standard", "total_max_attempts": 1}}}
    monkeypatch.setitem(stores.KINDS, "s3", replace(stores.KINDS["s3"], options=once))


@pytest.fixture(autouse=True)
def connections_are_new():
    """Each process keeps those that it has made, wherever they lead."""
    S3FileSystem.clear_instance_cache()


@pytest.fixture(autouse=True)
def programs_parse_their_flags():
    """Which grain asks for before it starts processes."""
    flags.FLAGS.mark_as_parsed()


def batches_of(place, workers=0):
    return latent_batches([(LatentRecords(place), 1.0)], SIZE, seed=3, workers=workers)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def equal(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder_from_any_position(address, folder, workers):
    expected = take(batches_of(folder), 9)
    for position in (0, 4) if workers == 0 else (2,):
        batches = batches_of(address, workers)
        batches.set_state({**batches.get_state(), "batches": position})
        assert all(equal(a, b) for a, b in zip(expected[position:], take(batches, 9 - position), strict=True))
        batches.close()


def test_google_gives_the_same_records(folder, monkeypatch):
    with google(monkeypatch, folder) as address:
        local, far = LatentRecords(folder), LatentRecords(address / "")
        far.verify()
        assert all(equal(local[i], far[i]) for i in range(len(local)))
        assert equal(next(batches_of(folder)), next(batches_of(address)))
        with pytest.raises(
            UserError, match=r"^gs://bucket/nowhere contains no encoded clips \(index.json is missing\)"
        ):
            LatentRecords(Address("gs://bucket/nowhere"))


def test_a_folder_is_listed_once_and_a_record_is_one_request(s3, address, folder):
    s3.requests.clear()
    records = LatentRecords(address)
    assert len(s3.requests) <= 6, s3.requests  # for the index, a list of the shards, and the negative prompt
    s3.requests.clear()
    local = LatentRecords(folder)
    assert all(equal(local[i], records[i]) for i in range(len(local)))
    assert len(s3.requests) == len(local) and all('" 206 ' in line for line in s3.requests), s3.requests
    assert equal(local[7], pickle.loads(pickle.dumps(records))[7])


def test_a_network_that_fails_now_and_then_changes_nothing(s3, address, folder, monkeypatch):
    network = BadNetwork(s3.port, 30_000)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{HOST}:{network.port}")
    expected, batches = take(batches_of(folder), 16), batches_of(address)
    assert all(equal(a, b) for a, b in zip(expected, take(batches, 16), strict=True))
    batches.close()
    network.close()
    assert network.broken >= 3, network.broken


def test_what_is_missing_or_damaged_is_said_when_opening(s3, folder):
    address = s3.put(folder, "incomplete")
    shard = json.loads((folder / "index.json").read_text())["shards"][0]
    path = f"bucket/incomplete/{shard['file']}"
    whole = s3.files.cat_file(path)
    s3.files.pipe_file(path, whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"^s3://{path} is damaged; remove it and run the same encode command again"):
        LatentRecords(address).verify()
    s3.files.pipe_file(path, whole[:-1])
    with pytest.raises(
        UserError, match=rf"^s3://{path} has \d+ bytes, expected {shard['bytes']} .* copy the folder ag"
    ):
        LatentRecords(address)
    s3.files.rm_file(path)
    with pytest.raises(UserError, match=rf"^s3://{path} is missing, expected {shard['bytes']} bytes; run the same"):
        LatentRecords(address)
    s3.files.rm_file("bucket/incomplete/index.json")
    with pytest.raises(
        UserError, match=r"^s3://bucket/incomplete: its encoding is not finished; run the same encode com"
    ):
        LatentRecords(address)
    for url in ("s3://bucket/nowhere", "s3://no-such-bucket/records"):
        with pytest.raises(UserError, match=rf"^{url} contains no encoded clips \(index.json is missing\)"):
            LatentRecords(Address(url))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_goes_while_it_is_read_ends_the_run(s3, folder, workers):
    address = s3.put(folder, f"going{workers}")
    batches = batches_of(address, workers)
    next(batches)
    for name in address.sizes("shards"):
        s3.files.rm_file(f"{address}/{name}")
    with pytest.raises(UserError, match=rf"^{address}/shards/.*array_record is gone; copy it there again$"):
        take(batches, 20)
    batches.close()


def test_a_store_that_goes_while_it_is_read_ends_the_run(folder, one_try, monkeypatch):
    server = S3(monkeypatch)
    batches = batches_of(server.put(folder, "records"))
    next(batches)
    server.stop()
    started = time.monotonic()
    with pytest.raises(
        UserError, match=r"^s3://bucket/records/shards/\S+: cannot be read: Could not connect to the en"
    ):
        take(batches, 20)
    batches.close()
    assert time.monotonic() - started < 5


def test_a_run_mixes_addresses_by_weight_and_writes_to_paths(s3, tmp_path):
    pipeline = load_pipeline("tiny", with_transformer=False)
    for name in ("real", "made"):
        s3.put(write_fitting(pipeline, tmp_path / name, 2), name)
    given = phase1.get_config()
    given.data.records = f"s3://bucket/real/=0.7,{tmp_path / 'made'}=0.2,s3://bucket/made=0.1"
    found = open_sources(parse(given).data, tmp_path, pipeline, "tiny")
    assert [(str(records.folder), weight) for records, weight in found] == [
        ("s3://bucket/real", 0.7),
        (str(tmp_path / "made"), 0.2),
        ("s3://bucket/made", 0.1),
    ]
    given.data.records, given.data.videos = "", "s3://bucket/videos"
    with pytest.raises(
        UserError, match=r"^s3://bucket/videos: an address, which only config.data.records may be; give a loc"
    ):
        open_sources(parse(given).data, tmp_path, pipeline, "tiny")
    with pytest.raises(UserError, match=r"^gs://bucket/made: an address, .* `aws s3 cp --recursive`\)$"):
        encode.main(["--videos=.", "--output=gs://bucket/made"])


def test_what_is_needed_to_read_is_said(address, monkeypatch):
    for url in ("http://bucket/records", "gs://", "s3:///"):
        with pytest.raises(UserError, match=rf"^{url}: not a supported address; expected gs://BUCKET/FOLDER or s"):
            Address(url)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "s3fs.core", None)
        with pytest.raises(
            UserError, match=r"^s3://.*s3fs, which reads s3:// addresses, .*; pip install 'vpae_jax\[bu"
        ):
            LatentRecords(address)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(
        UserError, match=r"Unable to locate credentials; check the network and the credentials \(`aws co"
    ):
        LatentRecords(address)
