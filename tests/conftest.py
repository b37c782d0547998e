"""Options of the whole suite."""


def pytest_addoption(parser):
    group = parser.getgroup("faults", "tests/faults: kills, damages, full disks, forged files, absurd commands")
    group.addoption("--faults", type=int, metavar="N", help="How many faults of each kind to try; by default a few.")
    group.addoption("--faults-from", type=int, default=0, metavar="I", help="Begin with the I-th fault of each kind.")
