"""Which indexes are made, how far a search with each goes, and what is left out before it is made."""

from types import SimpleNamespace

import numpy as np
import pytest

from gradindex import evaluation
from gradindex.errors import ArgumentError, OutOfMemoryError, RecallError
from gradindex.evaluation import efforts, floors, trials, tuning
from gradindex.evaluation import truth as truth_of
from gradindex.index import CompactIndex, Shape, fitted_directions
from gradindex.retrieval.candidates import Effort
from gradindex.store import GradientStore


@pytest.mark.slow
def test_more_lists_are_looked_into_where_that_answers_faster(store, monkeypatch):
    """Each proposal costs ten lists here: the fewest proposals win, not the fewest lists."""
    _, folder = store
    found = {}
    for cost, weight in (("proposals", 10), ("lists", 1e-3)):
        monkeypatch.setattr(
            efforts, "milliseconds",
            lambda s, c, t, e, k, sign=1, w=weight: 1e6 if e is None else w * e.proposals + e.probes,
        )  # fmt: skip
        found[cost] = evaluation.index(folder, recall=0.8, k=10, n_query=200, kind="ivf", dim=16).effort(10)
    assert found["proposals"].probes >= found["lists"].probes
    assert found["proposals"].proposals <= found["lists"].proposals
    assert found["proposals"] != found["lists"]


@pytest.mark.slow
def test_kind_and_numbers_can_be_chosen(store, quick):
    _, folder = store
    shape = evaluation.index(folder, recall=0.9, k=10, n_query=100, kind="ivf", dim=24).index.about["shape"]
    assert (shape["kind"], shape["dim"]) == ("ivf", 24)
    for options, message in (
        ({"kind": "hnsw"}, "kind is 'hnsw', but must be one of: flat, ivf, pq"),
        ({"dim": 0}, r"dim is 0, but must be from 1 to the numbers in a row, \d+"),
    ):
        with pytest.raises(ArgumentError, match=message):
            evaluation.index(folder, recall=0.9, k=10, n_query=100, **options)


def test_an_index_that_the_memory_cannot_hold_is_not_begun(store, quick, monkeypatch):
    _, folder = store
    n = 600
    monkeypatch.setattr(tuning, "available_bytes", lambda device: n * 2 * (32 + 8) // 2 + 1000)
    with pytest.raises(
        OutOfMemoryError, match=r"600 rows with 48 numbers .* GiB to build, .* fewer numbers: --dim (24|32)\."
    ):
        evaluation.index(folder, recall=0.9, k=10, n_query=100, dim=48)
    built = []
    build = CompactIndex.build.__func__
    monkeypatch.setattr(
        CompactIndex,
        "build",
        classmethod(lambda cls, shape, *rest: built.append(shape.dim) or build(cls, shape, *rest)),
    )
    evaluation.index(folder, recall=0.5, k=10, n_query=100)
    assert max(built) <= 32
    assert len(set(built)) == 2


@pytest.mark.parametrize(
    ("n", "dim", "kind", "expected"),
    [
        (20_000, 3360, None, {"flat", "pq"}),
        (250_000, 3000, None, {"ivf", "pq", "spill"}),
        (1_281_167, 3000, None, {"ivf", "spill"}),
        (20_000, 200, None, {"flat"}),
        (20_000, 200, "pq", {"pq"}),
    ],
)
def test_what_is_tried_fits_the_number_of_rows(n, dim, kind, expected):
    tried = tuning._shapes(SimpleNamespace(n_train=n, dim=dim), kind, None)
    assert {shape.kind for shape in tried} == expected
    assert all(shape.dim >= 256 for shape in tried if shape.kind == "pq" and kind is None)
    assert all(shape.lists > 0 for shape in tried if shape.kind == "ivf")


def test_rows_of_few_parts_are_first_put_into_several_lists():
    store = SimpleNamespace(n_train=200_000, dim=3000)
    kinds = [[shape.kind for shape in tuning._shapes(store, None, None, few_parts=few)] for few in (False, True)]
    assert kinds[0][0] == "ivf" and kinds[1][0] == "spill"
    assert sorted(kinds[0]) == sorted(kinds[1])


def test_what_reached_most_is_tried_last():
    def choice(milliseconds, at_least):
        return efforts.Choice(Shape("flat", 8), dict.fromkeys(efforts.SIGNS, Effort(1, 10)), milliseconds, at_least)

    choices = [choice(m, a) for m, a in ((5, 0.99), (1, 0.95), (9, 0.999), (2, 0.94), (3, 0.96), (8, 0.97), (4, 0.95))]
    assert [each.milliseconds for each in tuning._tries(choices)] == [1, 2, 3, 4, 5, 9]
    assert [each.milliseconds for each in tuning._tries(choices[:3])] == [1, 5, 9]


def test_what_cannot_reach_the_recall_is_not_made_and_what_it_would_reach_is_told(store, quick, monkeypatch, capsys):
    _, folder = store
    monkeypatch.setattr(CompactIndex, "build", lambda *_: pytest.fail("an index was made"))
    with pytest.raises(RecallError, match=r"all rows compared by 1 numbers each reach about (0\.\d+)\."):
        evaluation.index(folder, recall=0.999, k=10, n_query=100, kind="ivf", dim=1)
    assert "ivf of 1 numbers, 128 lists: left out, for all rows compared by so few numbers" in capsys.readouterr().err


def test_a_budget_ends_the_search_for_an_index(store, quick, monkeypatch, capsys):
    _, folder = store
    clock = [0.0]
    monkeypatch.setattr(tuning.time, "monotonic", lambda: clock[0])
    built, build = [], trials.Maker.build

    def slow(maker, shape):
        clock[0] += 50
        built.append(shape)
        return build(maker, shape)

    monkeypatch.setattr(trials.Maker, "build", slow)
    evaluation.index(folder, recall=0.5, k=10, n_query=100, budget=40)
    assert len(built) == 1
    held_out = truth_of.held_out
    monkeypatch.setattr(truth_of, "held_out", lambda *args: clock.__setitem__(0, clock[0] + 90) or held_out(*args))
    with pytest.raises(ArgumentError, match="budget is 60 s, but to find the true top-k .* took 90 s, .* 270 at least"):
        evaluation.index(folder, recall=0.5, k=10, n_query=100, budget=60)
    for options, message in (({"budget": -1}, "budget is -1"), ({"copies": 0}, "copies is 0")):
        with pytest.raises(ArgumentError, match=message):
            evaluation.index(folder, recall=0.5, k=10, **options)


def test_a_kind_that_lost_gets_no_more_than_a_third_of_the_fastest_ones_time():
    tried = object.__new__(trials.Trials)
    tried._until = np.inf
    tried.fastest = efforts.Choice(Shape("ivf", 16, 8), {}, 1.0, 1.0)
    for spent, enough in (({"ivf": 9.0, "pq": 2.9}, False), ({"ivf": 9.0, "pq": 3.1}, True), ({"ivf": 1.0}, False)):
        tried._spent = spent
        assert tried._enough(Shape("pq", 16)) is enough
        assert not tried._enough(Shape("ivf", 32, 8))


def test_another_kind_is_begun_only_where_making_it_takes_no_longer():
    tried = object.__new__(trials.Trials)
    tried._until, tried._spent = np.inf, {"spill": 10.0}
    tried.fastest = efforts.Choice(Shape("spill", 1000, 8), {}, 1.0, 1.0)
    assert tried._enough(Shape("ivf", 1000, 8)) and not tried._enough(Shape("ivf", 600, 8))
    tried.fastest = None  # what was tried reaches too little
    assert not tried._enough(Shape("ivf", 1000, 8))


def test_floors_say_what_all_rows_compared_by_so_few_numbers_reach(store):
    _, folder = store
    opened = GradientStore(folder)
    rows = opened.rows(opened.ids)
    truth = truth_of.held_out(opened, 200, 10)
    leading = fitted_directions(rows, 16)
    found = floors.Floors(opened, rows, truth, [4, 16], leading)
    for dim in (4, 16):
        directions = leading[:, :dim]
        for kind, sign in efforts.SIGNS.items():
            scores = sign * (truth.rows @ directions) @ (rows @ directions).T
            best = opened.ids[np.argsort(-scores, axis=1)[:, :41]]
            reached = truth.recalls(sign, best, 40)
            assert found.recall(dim, kind, 40) == pytest.approx(reached.mean(), abs=0.06)
    needed = found.proposals(16, 0.9, [10, 20, 40, 400])
    assert needed and all(10 <= count <= 400 for count in needed.values())
    assert found.proposals(4, 1.5, [400]) is None


def test_floors_look_at_the_whole_of_a_store_that_is_in_the_order_of_its_classes(store, monkeypatch):
    """The sample is in the order of the ids: its first part alone would be of some classes alone."""
    _, folder = store
    opened = GradientStore(folder)
    rows = opened.rows(opened.ids)
    order = np.argsort(rows @ fitted_directions(rows, 1)[:, 0])  # by what tells most of them apart
    truth = truth_of.held_out(opened, 200, 10)
    monkeypatch.setattr(floors, "_ROWS", 150)
    directions = fitted_directions(rows, 16)
    found, alone = (floors.Floors(opened, some, truth, [16], directions) for some in (rows[order], rows))
    for kind in efforts.SIGNS:
        assert found.recall(16, kind, 20) == pytest.approx(alone.recall(16, kind, 20), abs=0.05)


def test_the_last_step_looks_into_all_lists():
    assert Shape("spill", 16, 44, 2).method.probes == [1, 2, 4, 8, 16, 32, 44]
    assert Shape("ivf", 16, 32).method.probes == [1, 2, 4, 8, 16, 32]
    assert Shape("flat", 16).method.probes == [1]
