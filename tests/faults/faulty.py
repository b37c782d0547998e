"""Stores to break, what they answer, and children that do it."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

from gradindex.index import CompactIndex, Shape
from gradindex.retrieval.candidates import Candidates
from gradindex.store import GradientStore, overview


def make_index(folder):
    """A small index of a store, without the tuning that takes seconds."""
    store = GradientStore(folder)
    made = CompactIndex.build(Shape("ivf", 4, 3), store.rows(store.ids), store.blocks)
    about = {"map": store.manifest.fingerprint, "ids": store.id_runs.tolist(), "covers": store.origins}
    recall = {"k": 3, "proponents_at_least": 0.5, "opponents_at_least": 0.5, "against": "a test"}
    made.save(folder / "index", about | {"effort": {"probes": 2, "proposals": 8}, "recall": recall})


def everything(folder):
    """All that a store can answer, as bytes."""
    store = GradientStore(folder)
    ids = store.ids
    values = [ids, store.rows(ids), store.self_influence(), store.losses(), *map(store.column, store.columns)]
    if store.has_factors:
        values += [side for sides in store.factors(ids).values() for side in sides]
    values += [side for sides in (store.bases() or {}).values() for side in sides]
    values += [rows for _, rows in store.blocks()]
    values += store.top_self_influence(min(3, store.n_train))
    values += Candidates(store).search(store.rows(ids[:2]), 3)[1:]  # whose scores may be rounded by another route
    return [value.tobytes() for value in values] + [json.dumps(store.manifest.map.to_json())]


def fingerprint(folder):
    """A digest of everything; empty where there is no complete store."""
    if not (folder / "manifest.json").exists():
        return ""
    state = hashlib.sha256()
    for value in everything(folder):
        state.update(value if isinstance(value, bytes) else value.encode())
    return state.hexdigest()


def all_questions(folder):
    """Whatever reads a store, for faults that may be met anywhere."""
    everything(folder)
    overview(folder)
    GradientStore(folder).verify()


def lasting(folder):
    """All files but the log and locks, in which a killed process leaves its number, with their bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("log.jsonl", "lock")
    }


def digest_of(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def with_checksum(value):
    """As the store writes it."""
    value = {name: item for name, item in value.items() if name != "sha256"}
    return {**value, "sha256": digest_of(value)}


class Nursery:
    """Children that work on stores and can be killed at a file event, or given little room."""

    def __init__(self, folder):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "nursery.py"), str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def run(self, command, folder, **options):
        """Exit code and message of a child: 0 and the number of file events, 1 and an error for people, 3 and another.

        Killed, the code is minus the signal.
        """
        asked = {"command": command, "folder": str(folder), **options}
        self.process.stdin.write(json.dumps(asked, default=str) + "\n")
        self.process.stdin.flush()
        code, message = json.loads(self.process.stdout.readline())
        return code, message

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
