"""Memory that a thread keeps: given again for the same purpose, never shared with another purpose or thread."""

import threading

import numpy as np

from gradindex.store import scratch
from gradindex.store.scratch import rooms

SPECS = [((3, 5), np.float32), ((7,), np.uint8), ((0, 4), np.float64), ((2, 2), "<i8")]


def test_arrays_have_their_shapes_and_do_not_overlap():
    made = rooms("one", SPECS)
    assert [(array.shape, array.dtype) for array in made] == [(shape, np.dtype(kind)) for shape, kind in SPECS]
    for number, array in enumerate(made):
        array[...] = number
    assert all((array == number).all() for number, array in enumerate(made))


def test_memory_is_given_again_for_the_same_purpose_alone():
    (first,), (other,) = rooms("one", SPECS[:1]), rooms("another", SPECS[:1])
    (again,) = rooms("one", SPECS[:1])
    assert np.shares_memory(first, again) and not np.shares_memory(first, other)


def test_threads_share_nothing():
    (mine,), found = rooms("one", SPECS[:1]), []
    thread = threading.Thread(target=lambda: found.append(rooms("one", SPECS[:1])[0]))
    thread.start()
    thread.join()
    assert not np.shares_memory(mine, found[0])


def test_much_is_not_kept(monkeypatch):
    monkeypatch.setattr(scratch, "_MOST_BYTES", 64)
    (first,), (again,) = (rooms("much", [((1000,), np.float32)]) for _ in range(2))
    assert not np.shares_memory(first, again)
    assert rooms("none", []) == []
