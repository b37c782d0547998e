"""A process is killed at a file event, or its disk is full: nothing is lost, nothing is wrong, and it can go on."""

import random
import shutil
import signal

import faulty
import pytest

from gradindex.errors import StoreError
from gradindex.store import GradientStore

# What each command is given.
BEFORE = {
    "build": "empty", "add": "built", "add_checkpoint": "removed", "remove": "built", "compact": "removed",
    "merge": "two", "index": "removed", "repair": "damaged", "export": "removed",
}  # fmt: skip


@pytest.fixture(scope="module")
def ends(nursery, states, tmp_path_factory):
    """By command: how many file events it takes, the answers before and after, and the files after."""
    found = {}
    for command, before in BEFORE.items():
        folder = tmp_path_factory.mktemp(command) / "here"
        shutil.copytree(states[before], folder)
        try:
            first = faulty.fingerprint(folder / "store")
        except StoreError:
            first = "damaged"
        code, count = nursery.run(command, folder / "store")
        assert code == 0, count
        found[command] = int(count), first, faulty.fingerprint(folder / "store"), faulty.lasting(folder / "store")
    return found


def answers(folder):
    """As :func:`faulty.fingerprint`; of the damaged store, that it is."""
    try:
        return faulty.fingerprint(folder)
    except StoreError:
        return "damaged"


def made(folder):
    """Sealed shards, and which file each is."""
    seals = [path for path in (folder / "shards").glob("*.json") if path.with_suffix(".h5").exists()]
    return {path.stem: path.with_suffix(".h5").stat().st_ino for path in seals}


def test_a_kill_at_any_file_event_loses_nothing(nursery, states, ends, faults, tmp_path):
    for number in faults("kills at a file event", 27):
        generator = random.Random(f"kill {number}")
        command = list(BEFORE)[number % len(BEFORE)]
        events, before, after, files = ends[command]
        folder = tmp_path / "here"
        shutil.copytree(states[BEFORE[command]], folder)
        kill = generator.randrange(1, events + 1)
        code, said = nursery.run(command, folder / "store", kill=kill)
        assert code == -signal.SIGKILL, (command, kill, said)
        assert answers(folder / "store") in (before, after), (command, kill)
        sealed = made(folder / "store")
        code, said = nursery.run(command, folder / "store")
        assert code == 0, (command, kill, said)
        again = made(folder / "store")
        if command != "repair":  # of which one shard is begun anew
            assert all(again[name] == sealed[name] for name in sealed if name in again)  # what was finished is kept
        assert faulty.fingerprint(folder / "store") == after, (command, kill)
        assert GradientStore(folder / "store").verify() == []
        mine = faulty.lasting(folder / "store")
        assert not {"pending.json", "unfinished.json"} & mine.keys(), (command, kill)
        if command not in ("repair", "export"):  # a repair that is killed numbers its shard anew
            assert mine == files, (command, kill, mine.keys() ^ files.keys())
        shutil.rmtree(folder)


def test_a_full_disk_loses_nothing(nursery, states, ends, faults, tmp_path):
    for number in faults("full disks", 14):
        generator = random.Random(f"disk {number}")
        command = [name for name in BEFORE if name not in ("repair", "export")][number % (len(BEFORE) - 2)]
        _, before, after, files = ends[command]
        template, folder = states[BEFORE[command]], tmp_path / f"disk-{number}" / "store"
        # As the file system counts, in pages.
        there = sum(-(-path.stat().st_size // 4096) + 1 for path in template.rglob("*"))
        wanted = sum(-(-len(content) // 4096) + 1 for content in files.values())
        size = 4096 * (there + 2 + generator.randrange(wanted))
        allowed = [before, after]
        code, said = nursery.run(command, folder, disk=size, template=template, allowed=allowed)
        if code == 3 and "no mount namespace" in said:
            pytest.skip("no mount namespace for a small disk of one's own: not root")
        assert (code, said) in ((0, ""), (0, "no room")), (command, size, said)


def test_a_limit_on_the_size_of_files_loses_nothing(nursery, states, ends, faults, tmp_path):
    for number in faults("limits on the size of files", 7):
        generator = random.Random(f"limit {number}")
        command = [name for name in BEFORE if name not in ("repair", "export")][number % (len(BEFORE) - 2)]
        _, before, after, files = ends[command]
        folder = tmp_path / "here"
        shutil.copytree(states[BEFORE[command]], folder)
        limit = generator.randrange(1, max(map(len, files.values())))
        code, said = nursery.run(command, folder / "store", limit=limit)
        assert code in (0, 1), (command, limit, said)
        if code == 1:
            assert said.endswith("cannot be written: File too large. Finished work is kept.")
        assert answers(folder / "store") in (before, after)
        assert [path for path in folder.rglob("*") if ".tmp-" in path.name] == []
        assert nursery.run(command, folder / "store")[0] == 0
        assert faulty.lasting(folder / "store") == files
        shutil.rmtree(folder)
