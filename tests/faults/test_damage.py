"""A file of a store is damaged, forged, or no file at all: an answer is right, or one line says what is wrong."""

import contextlib
import copy
import json
import os
import random
import shutil
import signal
import socket
import stat
from dataclasses import replace
from pathlib import Path

import faulty
import pytest

import gradindex
from gradindex.errors import GradIndexError
from gradindex.store import GradientStore

SECONDS = 60


@contextlib.contextmanager
def no_hang():
    """An error where something is waited for without end."""

    def late(*_):
        raise TimeoutError(f"it did not end within {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def said(action):
    """The one line that an action ends with, or ``None``; any other error than those for people goes on."""
    line = None
    with no_hang():
        try:
            action()
        except GradIndexError as error:
            line = str(error)
    assert line is None or ("\n" not in line and len(line) < 1000)
    return line


def files_of(folder):
    """Those of which an answer may be made."""
    return sorted(path for path in folder.rglob("*") if path.suffix in (".h5", ".json", ".faiss"))


def damaged(content, others, generator):
    """A file's content after one of the ways in which disks and people spoil it."""
    place, size = generator.randrange(len(content)), generator.randrange(1, 5000)
    way = generator.randrange(7)
    if way == 0:
        return content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1 :]
    if way == 1:
        return content[:place]
    if way == 2:
        return content + generator.randbytes(size)
    if way == 3:
        return content[:place] + bytes(min(size, len(content) - place)) + content[place + size :]
    if way == 4:
        return generator.choice(others)
    if way == 5:
        return content[:place] + content[place + size :]
    return content[:place] + generator.randbytes(min(size, len(content) - place)) + content[place + size :]


@pytest.mark.slow
def test_no_damage_leads_to_a_wrong_answer(states, faults, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(states["indexed"] / "store", folder)
    # A manifest of an older state is no damage: its answers are the older ones.
    older = faulty.fingerprint(states["built"] / "store")
    whole, files = faulty.fingerprint(folder), {path: path.read_bytes() for path in files_of(folder)}
    before = (states["built"] / "store" / "manifest.json").read_bytes()
    tried = found = 0
    for number in faults("damages of a file", 150):
        generator = random.Random(f"damage {number}")
        path = generator.choice(list(files))
        others = [content for other, content in files.items() if other != path and other.suffix == path.suffix]
        content = damaged(files[path], [*others, before, b""], generator)
        path.unlink()  # a new file: the old one may still be mapped
        path.write_bytes(content)
        answers = []
        if said(lambda answers=answers: answers.append(faulty.fingerprint(folder))) is None:
            assert answers[0] in ((whole, older) if content == before else (whole,)), (number, path)
        else:
            found += 1
        tried += content != files[path]
        path.unlink()
        path.write_bytes(files[path])
    assert found >= 0.7 * tried  # the others lie in what is not looked at
    assert faulty.fingerprint(folder) == whole


def places_in(value, path=()):
    """Where in a JSON value something can be changed."""
    yield path
    if isinstance(value, dict):
        for name in value:
            yield from places_in(value[name], (*path, name))
    if isinstance(value, list):
        for place in range(min(len(value), 3)):
            yield from places_in(value[place], (*path, place))


ABSURD = (
    None, True, False, 0, 1, -1, 2, 7, 1 << 31, 1 << 53, (1 << 63) - 1, 1 << 63, 1 << 64, 10**400, -(1 << 63), 0.5, 1.0,
    float("nan"), float("inf"), 1e308, "", "a", "../../etc/passwd", "/etc/passwd", "0001-00000/../x", "\0", "\ud800",
    "0" * 64, "f" * 64, "<f8", "|O", "|V8", "|S0", "U", "x" * 100_000, [], {}, [[]], [[0, 1]], [[1, 0]], [[0, 1 << 62]],
    [[0, 5], [3, 9]], [None], [{}], {"": None}, {"a": {"b": []}}, [[0, 1.5]], "float16", "int8", "9999-99999",
)  # fmt: skip


def forged(value, generator):
    """A JSON object in which one place is something else."""
    value = copy.deepcopy(value)
    *way, last = generator.choice([path for path in places_in(value) if path and path != ("sha256",)])
    inside = value
    for step in way:
        inside = inside[step]
    act = generator.randrange(6)
    if act == 0:
        del inside[last]
    elif act == 1 and isinstance(inside, list):
        inside.insert(last, copy.deepcopy(inside[last]))
    elif act == 2:
        nested = []
        for _ in range(generator.choice([3, 500, 3000])):
            nested = [nested]
        inside[last] = nested
    elif act == 3 and type(inside[last]) is int:
        inside[last] += generator.choice([-1, 1, 64, -64, 1 << 40])
    else:
        inside[last] = copy.deepcopy(generator.choice(ABSURD))
    return value


def sealed_again(folder, path, value):
    """Write a forged file with right checksums, also in the files that name it: only its form can tell."""
    if path.name == "manifest.json" and "map" in value and path.parent == folder:
        value["fingerprint"] = faulty.digest_of({"version": 1, "map": value["map"]})
    value = faulty.with_checksum(value)
    path.write_text(json.dumps(value))
    if path.parent.name == "shards":
        manifest = json.loads((folder / "manifest.json").read_text())
        for entry in manifest["shards"]:
            if entry["name"] == path.stem:
                entry["seal"] = value["sha256"]
        (folder / "manifest.json").write_text(json.dumps(faulty.with_checksum(manifest)))


@pytest.mark.slow
def test_no_forged_file_leads_to_more_than_one_line(states, faults, tmp_path):
    """Valid JSON of another form, its checksums right: manifest, plan, seals, index."""
    template, folder = tmp_path / "template", tmp_path / "store"
    shutil.copytree(states["indexed"] / "store", template)
    shutil.copy(unfinished_plan(states, tmp_path), template / "pending.json")
    unfinished = {"shards": ["0003-00000"], "bases": None}
    (template / "unfinished.json").write_text(json.dumps(faulty.with_checksum(unfinished)))
    names = sorted(str(path.relative_to(template)) for path in template.rglob("*.json"))
    assert len(names) == 7
    refused = tried = 0
    for number in faults("forged files", 84):
        generator = random.Random(f"forged {number}")
        shutil.copytree(template, folder)
        path = folder / names[number % len(names)]
        try:
            sealed_again(folder, path, forged(json.loads(path.read_text()), generator))
        except RecursionError:  # of the forger
            shutil.rmtree(folder)
            continue
        lines = [said(lambda: faulty.all_questions(folder))]
        lines += [said(lambda: gradindex.store.remove(folder, [1])), said(lambda: gradindex.store.compact(folder))]
        lines += [said(lambda: GradientStore(folder).verify())]
        refused, tried = refused + any(lines), tried + 1
        shutil.rmtree(folder)
    assert refused > tried / 3


def unfinished_plan(states, tmp_path):
    """The plan of a compaction that was begun and not ended."""
    folder = tmp_path / "begun"
    shutil.copytree(states["indexed"] / "store", folder)
    from gradindex.store import upkeep

    with upkeep.changing(folder, "compact") as store:
        plan, keep = upkeep._repacking(store)
        upkeep.Job.begin(store.folder, "compact", replace(upkeep.kept(store), removed=()), None, plan, keep)
    return folder / "pending.json"


@pytest.mark.parametrize(
    "content",
    [
        b'{"format": "gradindex-store", "version": 1, "needs": [], "needs": []}',
        b'{"format": "gradindex-store", "version": ' + b"9" * 5000 + b"}",
        b'{"format": "gradindex-store", "version": 1, ' + b'"a": [' * 100_000,
        b'{"format": "gradindex-store", "version": 1, "needs": 7}',
        b'{"format": "gradindex-store", "version": 1, "needs": ["\\ud800"]}',
        b"[]", b"null", b'"text"', b"7", b"{}", b"\xff\xfe", b"",
    ],
)  # fmt: skip
def test_json_that_is_no_manifest_is_one_line(states, tmp_path, content):
    folder = tmp_path / "store"
    shutil.copytree(states["indexed"] / "store", folder)
    for name in ("manifest.json", "pending.json", "index/manifest.json"):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(content)
        assert said(lambda: (faulty.all_questions(folder), gradindex.store.remove(folder, [1])))
        (folder / name).unlink()
        if before is not None:
            (folder / name).write_bytes(before)


def pipe(path, tmp_path):
    os.mkfifo(path)


def folder_of(path, tmp_path):
    path.mkdir()


def socket_at(path, tmp_path):
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def link_to_nothing(path, tmp_path):
    path.symlink_to(tmp_path / "nothing")


def link_to_a_device(path, tmp_path):
    path.symlink_to("/dev/zero")


def link_to_a_loop(path, tmp_path):
    path.symlink_to(path.name)


KINDS = [pipe, folder_of, socket_at, link_to_nothing, link_to_a_device, link_to_a_loop]


@pytest.mark.slow
@pytest.mark.parametrize("make", KINDS)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_is_no_file_is_one_line_and_no_hang(states, nursery, faults, tmp_path, make):
    template = tmp_path / "template"
    shutil.copytree(states["indexed"] / "store", template)
    shutil.copy(unfinished_plan(states, tmp_path), template / "pending.json")
    names = sorted(str(path.relative_to(template)) for path in template.rglob("*") if path.is_file())
    names += ["unfinished.json"]
    assert {"lock", "lock-plan", "log.jsonl", "manifest.json", "index/manifest.json"} <= set(names)
    for number, name in zip(faults(f"no file: {make.__name__}", len(names)), names, strict=False):
        folder = tmp_path / str(number)
        shutil.copytree(template, folder)
        (folder / name).unlink(missing_ok=True)
        make(folder / name, tmp_path)
        kind = stat.S_IFMT((folder / name).lstat().st_mode)
        said(lambda folder=folder: faulty.all_questions(folder))
        lines = [said(lambda folder=folder: gradindex.store.compact(folder))]
        lines += [said(lambda folder=folder: gradindex.store.remove(folder, [1]))]
        if "/" not in name:
            code, message = nursery.run("build", folder, seconds=SECONDS)
            assert code in (0, 1), (name, message)
        if name.startswith("lock"):
            assert any(lines), name
            assert stat.S_IFMT((folder / name).lstat().st_mode) == kind
        shutil.rmtree(folder)
