"""When callbacks save, and what they refuse."""

import subprocess
import sys

import pytest

from gradindex.errors import ArgumentError
from gradindex.integrations.session import Schedule


def saved(schedule, total):
    return [step for step in range(1, total + 1) if schedule.due(step - 1, step)]


@pytest.mark.parametrize(
    ("chosen", "total", "steps"),
    [
        ({}, 25, [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]),
        ({"count": 3}, 9, [3, 6, 9]),
        ({"count": 1}, 9, [9]),
        ({"count": 5}, 3, [1, 2, 3]),
        ({"every": 4}, 10, [4, 8]),
        ({"at": [7, 2, 2]}, 10, [2, 7]),
    ],
)
def test_a_schedule_names_steps(chosen, total, steps):
    schedule = Schedule(**({"every": None, "at": None, "count": None} | chosen))
    schedule.begin(total)
    assert saved(schedule, total) == steps
    assert schedule.at_the_end == ("at" not in chosen)


def test_steps_between_two_questions_are_not_missed():
    schedule = Schedule(None, [3], None)
    schedule.begin(None)
    assert (schedule.due(0, 2), schedule.due(2, 4), schedule.due(4, 6)) == (False, True, False)
    assert [Schedule(3, None, None).due(*span) for span in ((0, 2), (2, 4), (4, 5), (5, 9))] == [
        False,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ((3, None, 4), "every, at and count exclude each other"),
        ((0, None, None), "every is 0, but must be at least 1"),
        ((None, [], None), "at is empty"),
        ((None, [2, -1], None), "at is -1, but must be at least 1"),
        ((None, None, 2.5), "count is 2.5, a float, but must be an integer"),
    ],
)
def test_schedules_that_cannot_be_are_refused(chosen, message):
    with pytest.raises(ArgumentError, match=message):
        Schedule(*chosen)


@pytest.mark.parametrize("total", [None, float("inf"), -1])
def test_a_count_needs_a_training_of_known_length(total):
    with pytest.raises(ArgumentError, match=r"count=10 needs the number of optimizer steps.*Give every= or at="):
        Schedule(None, None, None).begin(total)


def test_a_step_behind_the_end_is_refused():
    with pytest.raises(ArgumentError, match="at has step 30, but the training takes 20 optimizer steps"):
        Schedule(None, [5, 30], None).begin(20)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "missing"), [("hf", ["transformers"]), ("lightning", ["lightning", "pytorch_lightning"])]
)
def test_a_missing_library_is_named(module, missing):
    hidden = "".join(f"sys.modules[{name!r}] = None; " for name in missing)
    code = f"import sys; {hidden}import gradindex.integrations, gradindex.integrations.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"gradindex.errors.DependencyError: gradindex.integrations.{module} needs {missing[0]}")
    assert "pip install" in last
