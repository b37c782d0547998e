"""What the fault tests share: how many faults to try, which, and a table of how many were tried.

The i-th fault of a kind is the same whenever it is tried, so that a long run can be cut into pieces
(``--faults 100 --faults-from 300``) and a fault that was found can be tried alone.
"""

from collections import Counter

import pytest

_TRIED = Counter()


@pytest.fixture(scope="session")
def faults(request):
    """``faults(kind, few)``: the numbers of the faults to try, each counted for the table as it is handed out."""
    config = request.config

    def numbers(kind, few):
        first, count = config.getoption("--faults-from"), config.getoption("--faults")
        for number in range(first, first + (few if count is None else count)):
            _TRIED[kind] += 1
            yield number

    return numbers


def pytest_terminal_summary(terminalreporter):
    if _TRIED:
        terminalreporter.write_sep("-", "faults tried")
        for kind, count in sorted(_TRIED.items()):
            terminalreporter.write_line(f"{count:8,} {kind}")
