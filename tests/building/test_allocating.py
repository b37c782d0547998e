"""Large blocks stay with the process while a build computes, and go back afterwards."""

import os
import resource
import subprocess
import sys

import pytest
import toys

import gradindex
from gradindex import allocating
from gradindex.projection import Projection

CALLS = []


class Recording:
    """A C library that notes what it is told."""

    def mallopt(self, parameter, value):
        CALLS.append((parameter, value))

    def malloc_trim(self, pad):
        CALLS.append("trim")


@pytest.fixture
def libc(monkeypatch):
    CALLS.clear()
    for name in (*allocating._CHOSEN, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocating, "_glibc", Recording)


def test_nested_blocks_are_one(libc):
    with allocating.memory_kept():
        with allocating.memory_kept():
            assert CALLS == [(-4, 0), (-1, 2**31 - 1)]
        assert len(CALLS) == 2
    assert CALLS[2:] == [(-4, 65536), (-3, 32 << 20), (-1, 64 << 20), "trim"]


def test_memory_goes_back_after_a_failure(libc):
    with pytest.raises(ZeroDivisionError), allocating.memory_kept():
        raise ZeroDivisionError
    assert CALLS[-1] == "trim" and allocating._depth == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_MMAP_MAX_", "0"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=9"), ("LD_PRELOAD", "x.so")],
)
def test_what_the_environment_chooses_stays(libc, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with allocating.memory_kept():
        pass
    assert CALLS == []


def test_a_build_on_the_cpu_keeps_memory_and_answers_do_not(libc, tmp_path):
    task = toys.make_task(tmp_path, n_train=20)
    gradindex.build(task, tmp_path / "store", projection=Projection("none"))
    assert (CALLS.count((-4, 0)), CALLS.count("trim")) == (1, 1)
    gradindex.load(task, tmp_path / "store").proponents(0, 3)
    assert len(CALLS) == 6


@pytest.mark.skipif(allocating._glibc() is None, reason="the C library is not glibc")
def test_blocks_that_are_freed_take_no_page_faults_again():
    """In a process of its own, whose memory is not in pieces yet.

    Which freed block serves the next tensor is glibc's choice, also afterwards; what the system gets back is not.
    """
    code = """
import resource, torch
from gradindex.allocating import memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1])

faults()
outside = faults()
before = resident()
with memory_kept():
    faults()
    inside, kept = faults(), resident() - before
left = resident() - before
torch.ones(64 << 20)
print(outside, inside, kept, left, resident() - before)
"""
    environment = {name: value for name, value in os.environ.items() if name not in allocating._CHOSEN}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    outside, inside, kept, left, after_more = map(int, done.stdout.split())
    pages = (64 << 20) // resource.getpagesize()
    assert kept > pages / 2  # a tensor's block is still there
    assert left < kept / 4
    assert after_more < pages  # of a tensor four times as large, which no block of before could hold
    if outside < 2 * pages:  # as with pages of 2 MiB, of which there are few
        pytest.skip(f"only {outside} page faults for ten tensors")
    assert inside < outside / 5
