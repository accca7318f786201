"""Which clips no training sees."""

import numpy as np
import pytest
from record_files import SMALL, WIDE, number_of, write_folder

from vpae_jax.data.batches import latent_batches
from vpae_jax.data.order import held_out
from vpae_jax.data.records import LatentRecords
from vpae_jax.types import UserError


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two folders: 25 clips of two shapes; 10 of one."""
    root = tmp_path_factory.mktemp("sources")
    mixed = [(n, WIDE if n % 5 == 0 else SMALL) for n in range(25)]
    real = write_folder(root / "real", [mixed[:9], mixed[9:]])
    made = write_folder(root / "made", [[(n, SMALL) for n in range(100, 110)]])
    return [(LatentRecords(real), 3.0), (LatentRecords(made), 1.0)]


def seen(batches, count):
    return {number_of(latents) for _ in range(count) for latents in next(batches).latents}


def number(records, clip):
    return number_of(records[clip]["latents"])


def test_a_fifth_at_most_the_same_for_ever_and_nested():
    assert held_out(100, 7).tolist() == held_out(100, 20)[:7].tolist()
    assert len(held_out(100, 10**6)) == 20 and len(held_out(4, 9)) == 0 and len(held_out(9, 0)) == 0
    assert sorted(set(held_out(100, 20).tolist())) == sorted(held_out(100, 20).tolist())
    # Written down, since a later version that chose others would judge by what an earlier one trained on.
    assert held_out(1000, 5).tolist() == [473, 594, 664, 226, 844]
    spread = np.sort(held_out(10**6, 1000))
    assert spread[99] > 50_000 and spread[-100] < 950_000


@pytest.mark.parametrize("batch_size, seed, rows", [(4, 0, None), (3, 5, None), (4, 0, [1, 2])])
def test_no_batch_has_a_held_out_clip_whatever_its_size_and_seed(sources, batch_size, seed, rows):
    out = {number(records, clip) for records, _ in sources for clip in held_out(len(records), 256).tolist()}
    assert len(out) == 5 + 2
    found = seen(latent_batches(sources, batch_size, seed, rows=rows, most_held_out=256), 120)
    assert found == ({*range(25)} | {*range(100, 110)}) - out, "all others are trained on"


def test_shares_stay_those_of_the_weights(sources):
    batches = latent_batches(sources, 4, 1, most_held_out=256)
    made = [n >= 100 for _ in range(200) for n in map(number_of, next(batches).latents)]
    assert np.mean(made) == pytest.approx(0.25, abs=0.03)


def test_a_position_names_what_is_held_out(sources):
    position = latent_batches(sources, 4, 0, most_held_out=3).get_state()
    assert "22 of 25 clips of" in position["data"] and "8 of 10 clips of" in position["data"]
    latent_batches(sources, 4, 0, most_held_out=3).set_state(position)
    with pytest.raises(
        UserError, match=r"was trained on batches of 4 from 22 of 25 clips .*, but the data is now .* 25 of 25"
    ):
        latent_batches(sources, 4, 0).set_state(position)


def test_a_batch_must_fit_what_is_left(sources):
    with pytest.raises(UserError, match=r"config\.batch_size is 29, but there are 28 clips"):
        latent_batches(sources, 29, 0, most_held_out=256)
    latent_batches(sources, 29, 0)
