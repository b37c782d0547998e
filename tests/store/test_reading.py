"""How the disk is asked: for what is scattered alone, and ahead for what lies in a row."""

import mmap

import numpy as np
import pytest

from gradindex.errors import StoreError
from gradindex.files import read_checked
from gradindex.store.container import BLOCK_BYTES, Container, writing

pytestmark = pytest.mark.skipif(not hasattr(mmap.mmap, "madvise"), reason="the system takes no advice")


class Listening:
    """A map that keeps what it is advised."""

    def __init__(self, whole):
        self.whole, self.advice = whole, []

    def __len__(self):
        return len(self.whole)

    def madvise(self, *advice):
        self.advice.append(advice)
        self.whole.madvise(*advice)


@pytest.fixture
def container(tmp_path):
    path, values = tmp_path / "file.h5", np.arange(40 * BLOCK_BYTES // 4, dtype="<f4").reshape(-1, 64)
    with writing(path, {"values": (values.shape, "<f4")}, {}, {}) as writer:
        writer.put("values", 0, values)
    opened = Container(path, read_checked(path.with_suffix(".json")))
    opened._map = Listening(opened._map)
    opened.true = values
    return opened


def test_scattered_positions_are_read_alone_their_blocks_all_at_once(container):
    positions = np.array([3, 900, 2000])
    np.testing.assert_array_equal(container.take("values", positions), container.true[positions])
    first, *rest = container._map.advice
    assert first == (mmap.MADV_RANDOM,)
    assert len(rest) == 3 and all(kind == mmap.MADV_WILLNEED for kind, *_ in rest)
    container._map.advice.clear()
    container.take("values", positions)
    assert not container._map.advice  # verified before, so nothing is asked for again


def test_ranges_are_read_ahead_also_after_scattered_positions(container):
    container.take("values", np.array([3, 2000]))
    container._map.advice.clear()
    np.testing.assert_array_equal(container.view("values", 100, 900), container.true[100:900])
    assert container._map.advice == [(mmap.MADV_NORMAL,)]
    container._map.advice.clear()
    container.take("values", np.arange(900, 1500)[::-1])
    assert not container._map.advice


def test_damage_is_found_either_way(container):
    content = bytearray(container.path.read_bytes())
    content[30 * BLOCK_BYTES] ^= 1
    container.path.write_bytes(content)
    again = Container(container.path, read_checked(container.path.with_suffix(".json")))
    with pytest.raises(StoreError, match="block 30"):
        again.take("values", np.array([0, 30 * BLOCK_BYTES // 256]))
    with pytest.raises(StoreError, match="block 30"):
        again.view("values")
