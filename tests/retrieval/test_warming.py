"""Getting ready for queries in the background: nothing is left for the first query, no damage is lost, no thread."""

import gc
import os
import threading
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from questions import make

import gradindex
from gradindex import store
from gradindex.errors import StoreError
from gradindex.projection import Projection
from gradindex.retrieval import warming
from gradindex.retrieval.candidates import Candidates
from gradindex.store import container, touching

LARGE = {"projection": Projection(dim=512), "factors": "float32"}


@pytest.fixture
def digests(monkeypatch):
    """Blocks that were compared with their checksums, by the names of threads."""
    compared, digest = [], container._digest

    def counted(block):
        compared.append(threading.current_thread().name)
        return digest(block)

    monkeypatch.setattr(container, "_digest", counted)
    return compared


@pytest.fixture
def slow(monkeypatch):
    """Blocks are verified one by one; whoever sets the event has the thread go on."""
    going, verify = threading.Event(), container.Container.verify

    def slowly(self, blocks, then):
        going.wait(10)
        verify(self, blocks, then)

    monkeypatch.setattr(container.Container, "verify", slowly)
    monkeypatch.setattr(touching, "_AT_ONCE", 1)
    return going


def opened(made, **options):
    return gradindex.load(made.task, made.store.folder, **options)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "gradindex warming"]


@pytest.mark.parametrize("name", ["factors", "plain", "unit", "indexed"])
def test_the_first_query_verifies_nothing(request, name, digests):
    made = request.getfixturevalue(name)
    cold = opened(made)
    prepared = cold.prepare([3])
    expected = cold.both(prepared, 5)
    in_queries = len(digests)
    assert in_queries > 0
    del digests[:]
    retriever = opened(made, warm=True)
    warmth = retriever.warm(wait=True)
    assert warmth.ready
    assert warmth.done_bytes == warmth.total_bytes >= container.BLOCK_BYTES * len(made.store.manifest.shards)
    assert warmth.left_out_bytes == 0
    assert str(warmth) == f"ready, {warmth.done_bytes / 1e6:,.0f} MB verified"
    assert "gradindex warming" in digests
    del digests[:]
    for kind in (0, 1):
        answer, before = retriever.both(retriever.prepare([3]), 5)[kind], expected[kind]
        np.testing.assert_array_equal(answer.ids, before.ids)
        np.testing.assert_array_equal(answer.scores, before.scores)
    retriever.proponents([3], 5, where={"label": "cat"})
    assert digests == []


def test_a_retriever_that_was_not_asked_does_nothing(factors):
    retriever = opened(factors)
    assert retriever.warmth is None
    assert threads() == []


def test_queries_and_the_thread_share_what_is_verified(factors, slow, digests):
    expected = opened(factors).both([2], 5)
    retriever = opened(factors, warm=True)
    shards = [retriever.store.shard(entry.name).arrays for entry in retriever.store.manifest.shards]
    before = sum(int(arrays.sound.sum()) for arrays in shards)
    del digests[:]
    answer = retriever.both([2], 5)
    np.testing.assert_array_equal(answer[0].scores, expected[0].scores)
    assert len(digests) > 0
    assert not retriever.warmth.over
    slow.set()
    assert retriever.warm(wait=True).ready
    assert sum(int(arrays.sound.sum()) for arrays in shards) - before == len(digests)  # no block twice


def damage(made, name):
    """Flip a byte in the middle of an array of the last shard."""
    entry = made.manifest.shards[-1]
    place = made.shard(entry.name).seal["arrays"][name]
    size = int(np.prod(place["shape"])) * np.dtype(place["dtype"]).itemsize
    path = made.folder / "shards" / f"{entry.name}.h5"
    content = bytearray(path.read_bytes())
    content[place["offset"] + size // 2] ^= 1
    path.write_bytes(content)


def test_damage_is_said_by_the_next_query_and_by_whoever_waits(tmp_path):
    made = make(tmp_path, index=True, **LARGE)
    prepared = made.prepare([0])
    damage(made.store, "rows")
    retriever = opened(made, warm=True)
    while not retriever.warmth.over:
        time.sleep(0.01)
    assert not retriever.warmth.ready
    assert "stopped: " in str(retriever.warmth)
    said = rf"{made.store.manifest.shards[-1].name}.h5 is damaged \(block \d+, in rows\). Run `gradindex verify`"
    with pytest.raises(StoreError, match=said):
        retriever.both(prepared, 5)
    # The answer itself takes no full rows, and so none of the damage.
    np.testing.assert_array_equal(retriever.both(prepared, 5)[0].ids, made.both(prepared, 5)[0].ids)
    with pytest.raises(StoreError, match=said):
        retriever.warm(wait=True)
    with pytest.raises(StoreError, match=said):
        opened(made, warm=True).warm(wait=True)


def test_what_does_not_fit_the_memory_is_left_out(tmp_path, monkeypatch, digests):
    made = make(tmp_path, index=True, **LARGE)
    whole = opened(made).warm(wait=True).total_bytes
    monkeypatch.setattr(warming, "free_bytes", lambda: whole // 2)
    del digests[:]
    retriever = opened(made)
    warmth = retriever.warm(wait=True)
    assert warmth.ready
    room = int(warming._SHARE * (whole // 2))
    assert (warmth.total_bytes, warmth.left_out_bytes) == (room, whole - room)
    assert str(warmth).endswith(" MB left out, which the free memory does not hold")
    assert len(digests) * container.BLOCK_BYTES < whole
    np.testing.assert_array_equal(retriever.both([1], 5)[0].ids, made.both([1], 5)[0].ids)


def mapped(folder):
    return str(folder) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")
def test_a_retriever_that_is_dropped_leaves_no_thread_and_no_file(tmp_path, slow):
    made = make(tmp_path, factors="float32")
    task, folder = made.task, made.store.folder
    del made
    retriever = gradindex.load(task, folder, warm=True)
    (thread,) = threads()
    threading.Timer(0.1, slow.set).start()
    del retriever
    gc.collect()
    assert not thread.is_alive()
    gc.collect()
    assert not mapped(folder)


def test_a_store_that_changes_is_warmed_anew(tmp_path, slow):
    made = make(tmp_path, factors="float32")
    retriever = opened(made, warm=True)
    (before,) = threads()
    store.remove(made.store.folder, list(range(80)))
    store.compact(made.store.folder)
    slow.set()
    hits = retriever.proponents([0], 20)
    assert hits.ids.min() >= 80
    assert not before.is_alive()
    warmth = retriever.warm(wait=True)
    assert warmth.ready
    assert warmth.total_bytes == opened(made).warm(wait=True).total_bytes


def test_a_change_that_takes_files_away_is_no_damage(tmp_path):
    made = make(tmp_path, factors="float32")
    before = store.GradientStore(made.store.folder)
    candidates = Candidates(before)
    store.remove(made.store.folder, [5])
    store.compact(made.store.folder)
    thread = warming.Warming(before, candidates, None)
    assert not thread.waited().ready
    assert "the store has changed" in str(thread.warmth)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no processes are forked here")
def test_a_child_of_a_fork_has_no_thread_and_can_begin_again(factors, slow):
    retriever = opened(factors, warm=True)
    prepared = retriever.prepare([1])
    expected = opened(factors).both(prepared, 5)[0].ids
    threading.Timer(0.2, slow.set).start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that threads do not live on in a child is what this is about
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = 2 * (not retriever.warmth.over)
            code |= 4 * (not np.array_equal(retriever.both(prepared, 5)[0].ids, expected))
            retriever._warming = warming.Warming(*retriever._now(), None)
            code |= 8 * (not retriever.warm(wait=True).ready)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert retriever.warm(wait=True).ready


def test_a_query_that_cannot_be_tried_is_said_and_stops_nothing(factors):
    class Broken:
        def __len__(self):
            return 2

        def __getitem__(self, i):
            raise OSError("no such picture")

    task = replace(factors.task, query=Broken(), query_columns={})
    warmth = gradindex.load(task, factors.store.folder, warm=True).warm(wait=True)
    assert warmth.ready
    assert "no question could be tried (" in str(warmth)
    assert "no such picture" in str(warmth)


def test_a_task_without_queries_tries_a_training_example(factors):
    task = replace(factors.task, query=None, query_columns={})
    warmth = gradindex.load(task, factors.store.folder, warm=True).warm(wait=True)
    assert (warmth.ready, warmth.note) == (True, "")


def test_threads_that_ask_meanwhile_get_the_same(factors, slow):
    retriever = opened(factors, warm=True)
    prepared = [retriever.prepare([i]) for i in range(4)]
    expected = [opened(factors).both(each, 7) for each in prepared]
    slow.set()
    answers = [None] * 4

    def ask(number):
        answers[number] = retriever.both(prepared[number], 7)

    asking = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    for answer, before in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(answer[1].scores, before[1].scores)
    retriever.warm(wait=True)
