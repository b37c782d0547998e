"""What the fault tests share: how many faults to try, which, and a table of how many were tried.

The i-th fault of a kind is the same whenever it is tried, so that a long run can be cut into pieces
(``--faults 100 --faults-from 300``) and a fault that was found can be tried alone.
"""

import pytest


@pytest.fixture(scope="session")
def faults(request):
    """``faults(kind, few)``: the numbers of the faults to try, each counted for the table as it is handed out."""
    config = request.config

    def numbers(kind, few):
        first, count = config.getoption("--faults-from"), config.getoption("--faults")
        for number in range(first, first + (few if count is None else count)):
            config.faults_tried[kind] += 1
            yield number

    return numbers


@pytest.fixture(scope="session")
def nursery(tmp_path_factory):
    """Children that work on stores; see :class:`faulty.Nursery`."""
    import faulty

    nursery = faulty.Nursery(tmp_path_factory.mktemp("task"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def states(nursery, tmp_path_factory):
    """Folders to copy, each with a ``store``: ``{name: folder}``; what each is ready for is in ``NEXT``."""
    import shutil

    root = tmp_path_factory.mktemp("states")

    def state(name, *commands, before=None):
        folder = root / name
        folder.mkdir() if before is None else shutil.copytree(root / before, folder)
        for command in commands:
            assert nursery.run(command, folder / "store")[0] == 0, command
        return folder

    found = {"empty": state("empty"), "built": state("built", "build")}
    found["removed"] = state("removed", "remove", before="built")
    found["indexed"] = state("indexed", "index", before="removed")
    found["two"] = state("two", before="removed")
    shutil.copytree(found["built"] / "store", found["two"] / "other")
    found["damaged"] = state("damaged", before="removed")
    path = sorted((found["damaged"] / "store" / "shards").glob("*.h5"))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return found
