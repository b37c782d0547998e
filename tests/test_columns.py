"""Values beside the examples: by place, whatever holds them; what is missing stays missing, dates stay dates."""

import array
import collections
import datetime
import enum
import functools
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest
import torch
import toys

import gradindex
from gradindex.columns import Column, date_texts
from gradindex.errors import ArgumentError, TaskError
from gradindex.projection import Projection
from gradindex.retrieval.filters import parse_where

OPTIONS = {"projection": Projection(dim=8), "batch_size": 4, "shard_rows": 4}
NAN = float("nan")


def column(values, n=None):
    return Column("columns['c']", values, len(values) if n is None else n, "train")


def taken(values):
    """All values, and some of them backwards, as a store would have them, with the type."""
    made = column(values)
    every, some = made.take(np.arange(len(values))), made.take(np.array([2, 0]))
    assert every.dtype.kind == ("U" if made.kind == "U" else np.dtype(made.kind).kind)
    np.testing.assert_array_equal(some, every[[2, 0]])
    return every.tolist(), made.kind


class ByPlace:
    """Like a column of a data set: a length and places, nothing else."""

    def __init__(self, values):
        self._values = values

    def __len__(self):
        return len(self._values)

    def __getitem__(self, place):
        if not isinstance(place, int):
            raise TypeError("places are int")
        return self._values[place]


class WithArray(ByPlace):
    """Like an HDF5 dataset or an Arrow array: it can become an array."""

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self._values, dtype=dtype)


class ToNumpy:
    """Like a Series of another library, whose places are labels."""

    def __init__(self, values):
        self._values = values

    def __len__(self):
        return len(self._values)

    def __getitem__(self, label):
        raise KeyError(label)

    def to_numpy(self):
        return np.asarray(self._values)


@pytest.mark.parametrize(
    "make",
    [
        list, tuple, np.array, torch.tensor, ByPlace, WithArray, ToNumpy, collections.deque, collections.UserList,
        functools.partial(array.array, "q"),
        lambda v: dict(zip(v, v, strict=True)).values(), lambda v: dict.fromkeys(v).keys(),
        lambda v: [torch.tensor(x) for x in v], lambda v: [np.int64(x) for x in v], lambda v: np.array(v, dtype=object),
        lambda v: np.array(v, dtype=">i8"), lambda v: torch.tensor(v)[torch.arange(len(v))],
    ],
)  # fmt: skip
def test_whole_numbers_by_place_whatever_holds_them(make):
    assert taken(make([30, 10, 20])) == ([30, 10, 20], "<i8")


class Colour(enum.IntEnum):
    RED = 1
    BLUE = 2


def zone(hours):
    return datetime.timezone(datetime.timedelta(hours=hours))


@pytest.mark.parametrize(
    ("values", "expected", "kind"),
    [
        (range(5, 8), [5, 6, 7], "<i8"),
        ([True, False, True], [True, False, True], "|b1"),
        (torch.tensor([True, False, True]), [True, False, True], "|b1"),
        (torch.tensor([1.5, 2.0, 3.0], dtype=torch.bfloat16), [1.5, 2.0, 3.0], "<f4"),
        (torch.tensor([1.5, 2.0, 3.0], requires_grad=True), [1.5, 2.0, 3.0], "<f4"),
        ([1, 2.5, 3], [1.0, 2.5, 3.0], "<f8"),
        ([Colour.RED, Colour.BLUE, Colour.RED], [1, 2, 1], "<i8"),
        (["é", "", "long text"], ["é", "", "long text"], "U"),
        (np.array(["a", "bc", "d"]), ["a", "bc", "d"], "U"),
        ([np.str_("a"), "b", "c"], ["a", "b", "c"], "U"),
        # What is missing: the empty text, or NaN.
        (["a", None, NAN], ["a", "", ""], "U"),
        (np.array(["a", np.nan, None], dtype=object), ["a", "", ""], "U"),
        ([1, None, 3], [1.0, NAN, 3.0], "<f8"),
        ([True, None, False], [1.0, NAN, 0.0], "<f8"),
        ([1.5, NAN, None], [1.5, NAN, NAN], "<f8"),
        ([None, None, None], [NAN, NAN, NAN], "<f8"),
        (np.ma.masked_array([1, 2, 3], mask=[False, True, False]), [1.0, NAN, 3.0], "<f8"),
        # Dates.
        (
            np.array(["2024-01-31", "2023-02-01", "NaT"], dtype="datetime64[D]"),
            ["2024-01-31", "2023-02-01", ""],
            "U",
        ),
        (
            np.array(["2024-01-31T12:30", "2023-02-01", "2023-02-01T00:00:00.25"], dtype="datetime64[ns]"),
            ["2024-01-31T12:30:00", "2023-02-01", "2023-02-01T00:00:00.25"],
            "U",
        ),
        (np.array(["2024", "2023", "2022"], dtype="datetime64[Y]"), ["2024-01-01", "2023-01-01", "2022-01-01"], "U"),
        (
            [datetime.date(2024, 1, 31), datetime.datetime(2024, 1, 31, 8, 0, 0, 500_000), None],
            ["2024-01-31", "2024-01-31T08:00:00.5", ""],
            "U",
        ),
        (
            [datetime.datetime(2024, 1, 31, 1, tzinfo=zone(hours)) for hours in (0, 2, -3)],
            ["2024-01-31T01:00:00+00:00", "2024-01-30T23:00:00+00:00", "2024-01-31T04:00:00+00:00"],
            "U",
        ),
        ([np.datetime64("2024-01-31"), np.datetime64("NaT"), "NaT and None"][:2] * 2, ["2024-01-31", ""] * 2, "U"),
    ],
)  # fmt: skip
def test_values_as_they_are_kept(values, expected, kind):
    every, found = taken(values)
    assert found == kind
    np.testing.assert_array_equal(every, expected)


def test_dates_as_text_sort_as_dates():
    moments = np.array("2024-01-31T23:59:59", "M8[ns]") + np.random.default_rng(0).integers(0, 3 * 10**9, 200).astype(
        "m8[ns]"
    )
    moments = np.concatenate(
        [moments, moments.astype("M8[s]").astype("M8[ns]"), moments.astype("M8[ms]").astype("M8[ns]")]
    )
    texts = date_texts(moments)
    assert sorted(texts.tolist()) == date_texts(np.sort(moments)).tolist()
    aware = [
        datetime.datetime(2024, 1, 31, 0, 0, 0, us, tzinfo=datetime.timezone.utc)
        for us in (0, 200_000, 250_000, 500_000)
    ]
    assert taken(aware)[0] == sorted(taken(aware)[0])


REFUSED = {
    "numbers as text among numbers": ([1, "2", 3], r"mixes whole numbers \(at place 0\) and texts \(at place 1\)"),
    "fractions among texts": (["a", 1.5, "b"], r"mixes texts \(at place 0\) and fractions \(at place 1\)"),
    "flags among numbers": ([True, 2, False], "mixes true or false .* and whole numbers"),
    "dates among texts": (["a", datetime.date(2024, 1, 1), "b"], "mixes texts .* and dates"),
    "some zones": (
        [datetime.datetime(2024, 1, 1), datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc)],
        "with and without a time zone",
    ),
    "two axes": (np.zeros((3, 2)), r"has 2 axes \(its shape is \(3, 2\)\)"),
    "a tensor with two axes": (torch.zeros(3, 2), "has 2 axes"),
    "lists": ([[1], [2], [3]], "holds a list.*Split it into several columns"),
    "arrays": ([np.zeros(2)] * 3, "holds a ndarray.*Split it"),
    "objects": ([1, object(), 2], r"holds a object \(at place 1\)"),
    "complex": ([1j, 2j], "holds a complex"),
    "complex tensor": (torch.zeros(3, dtype=torch.complex64), "of type complex64"),
    "longdouble": (np.zeros(3, dtype=np.longdouble), "of type float128"),
    "longdouble scalars": ([np.longdouble(1)] * 3, "holds a longdouble"),
    "bytes": ([b"cat", b"dog"], "holds a bytes.*Decode them.*asstr"),
    "array of bytes": (np.array([b"cat", b"dog"]), r"of type \|S3"),
    "durations": (np.array([1, 2], dtype="m8[s]"), r"of type timedelta64\[s\]"),
    "duration objects": ([datetime.timedelta(1)] * 2, "Give durations as numbers"),
    "beyond 64 bits": ([2**70, 1], "beyond 64 bits"),
    "inexact beside missing": ([2**53 + 1, None], "9007199254740993 beside values that are missing.*as text"),
    "inexact beside fractions": ([2**60 + 1, 0.5], "beside other numbers"),
    "no Unicode": (["a", "\udcff"], r"no Unicode .*at place 1"),
    "long": (["a", "b" * 70_000], r"a text of 70,000 bytes \(at place 1\), but at most 65,536"),
    "a zero character at the end": (["a\0", "b"], "ends in a zero character"),
    "one text": ("abc", "is a str, one text"),
    "a set": ({1, 2, 3}, "is a set, which has no order"),
    "a dict": ({0: "a", 1: "b"}, "is a dict, which has no order of places"),
    "a generator": ((i for i in range(3)), r"is a generator without places.*list\(\.\.\.\)"),
    "one number": (3, "is a int without places"),
    "sparse": (torch.eye(3)[0].to_sparse(), r"Reading columns\['c'\] failed"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_is_refused_in_one_line(case):
    values, message = REFUSED[case]
    with pytest.raises(TaskError, match=message) as caught:
        column(values, len(values) if hasattr(values, "__len__") else 3)
    assert "\n" not in str(caught.value) and "columns['c']" in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([1, 2, 3], "columns is a list, but must be a mapping"),
        ({3: range(12)}, "has a column 3, but a name must be a text"),
        ({"c": [1]}, r"columns\['c'\] has 1 values, but train has 12 examples"),
    ],
)
def test_columns_that_are_none_are_refused(tmp_path, columns, message):
    with pytest.raises(TaskError, match=message):
        toys.make_task(tmp_path, columns=columns)


@pytest.fixture(scope="module")
def pd():
    return pytest.importorskip("pandas")


def series(pd):
    """By name a series of 12 values whose labels are not their places, and what is meant."""
    frame = pd.DataFrame({"name": [f"row{i}" for i in range(40)], "x": np.arange(40)})
    shuffled = frame.sample(frac=1, random_state=1)
    days = pd.date_range("2024-01-31", periods=12)
    zoned = pd.Series(days.tz_localize("Europe/Berlin"))
    texts = [f"t{i}" if i % 5 else None for i in range(12)]
    cases = {
        "shuffled": (shuffled["name"].iloc[:12], None),
        "split": (shuffled["x"].iloc[5:17], None),
        "filtered": (frame["name"][frame["x"] >= 28], None),
        "labels twice": (pd.concat([frame["x"].iloc[:6]] * 2), None),
        "two levels": (frame.assign(k=frame["x"] % 3).set_index(["k", "x"])["name"].iloc[:12], None),
        "index": (pd.Index(range(20, 8, -1)), list(range(20, 8, -1))),
        "categorical": (pd.Categorical(list("cab") * 4), list("cab") * 4),
        "category": (pd.Series(list("cab") * 4, dtype="category").iloc[::-1], list("bac") * 4),
        "category with gaps": (pd.Series(texts, dtype="category"), [t or "" for t in texts]),
        "days": (days, [f"2024-{'01' if i == 0 else '02'}-{31 if i == 0 else f'{i:02}'}" for i in range(12)]),
        "zoned": (zoned, [zoned[i].tz_convert("UTC").isoformat() for i in range(12)]),
        "dates with gaps": (pd.Series([*days[:11], pd.NaT]), [*(str(d.date()) for d in days[:11]), ""]),
        "objects with gaps": (pd.Series(texts, dtype=object), [t or "" for t in texts]),
        "string": (pd.Series(texts, dtype="string"), [t or "" for t in texts]),
        "Int64": (pd.Series([*range(11), None], dtype="Int64"), [*map(float, range(11)), NAN]),
        "Int64 whole": (pd.Series(range(12), dtype="Int64"), list(range(12))),
        "boolean": (pd.Series([True, False, None] * 4, dtype="boolean"), [1.0, 0.0, NAN] * 4),
        "Float64": (pd.Series([0.5, None, 1.0] * 4, dtype="Float64"), [0.5, NAN, 1.0] * 4),
        "sparse": (pd.Series(pd.arrays.SparseArray([0, 0, 1] * 4)), [0, 0, 1] * 4),
    }
    return {name: (values, values.tolist() if meant is None else meant) for name, (values, meant) in cases.items()}


def test_every_kind_of_pandas_series_is_stored_by_place(pd, tmp_path):
    cases = series(pd)
    task = toys.make_task(tmp_path, columns={name: values for name, (values, _) in cases.items()})
    store = gradindex.build(task, tmp_path / "store", **OPTIONS)
    for name, (_, meant) in cases.items():
        np.testing.assert_array_equal(store.column(name), meant, err_msg=name)
    assert store.verify() == []
    # Of queries too, and a frame is a mapping of columns.
    frame = pd.DataFrame({"name": list("wxyz"), "day": pd.date_range("2024-01-31", periods=4)}, index=[3, 1, 0, 2])
    asked = replace(task, query_columns=frame).column_arrays("query", [2, 0])
    assert {name: values.tolist() for name, values in asked.items()} == {
        "name": ["y", "w"],
        "day": ["2024-02-02", "2024-01-31"],
    }
    for values in (pd.MultiIndex.from_product([range(3), range(4)]), pd.period_range("2024-01", periods=12, freq="M")):
        with pytest.raises(TaskError, match="holds a (tuple|Period)"):
            replace(task, columns={"c": values})
    with pytest.raises(TaskError, match="has 2 axes"):
        replace(task, columns={"c": pd.DataFrame({"a": range(12)})})


@pytest.fixture
def gaps(tmp_path):
    """A store whose values are missing here and there, and its task."""
    day = np.array("2024-01-31", "M8[D]") + np.arange(12)
    day[3] = "NaT"
    columns = {
        "word": [None if i in (2, 7) else f"w{i % 3}" for i in range(12)],
        "number": [None if i in (2, 5) else i % 3 for i in range(12)],
        "day": day,
    }
    queries = {"word": ["w0", None, "w1", "w2"], "number": [0, None, 1, 2]}
    task = toys.make_task(tmp_path, columns=columns, query_columns=queries)
    return task, gradindex.build(task, tmp_path / "store", **OPTIONS)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"word": None}, [2, 7]),
        ({"word": ["w0", None]}, [0, 2, 3, 6, 7, 9]),
        ({"number": None}, [2, 5]),
        ({"number": NAN}, [2, 5]),
        ({"number": [np.float32(1), None]}, [1, 2, 4, 5, 7, 10]),
        ({"number": torch.tensor(1)}, [1, 4, 7, 10]),
        ({"number": torch.tensor([0, 1])}, [0, 1, 3, 4, 6, 7, 9, 10]),
        ({"word": np.array(["w1"])}, [1, 4, 10]),
        ({"word": {"w1": 0, "w2": 0}.keys()}, [1, 4, 5, 8, 10, 11]),
        ({"day": None}, [3]),
        ({"day": datetime.date(2024, 2, 1)}, [1]),
        ({"day": np.datetime64("2024-02-01T00", "h")}, [1]),
        ({"day": ["2024-02-01", datetime.datetime(2024, 2, 2)]}, [1, 2]),
        ({"day": np.array(["2024-02-01", "2024-02-02"], dtype="M8[s]")}, [1, 2]),
        ({"day": datetime.datetime(2024, 2, 1, 8)}, []),
    ],
)
def test_a_filter_can_ask_for_dates_and_for_what_is_missing(gaps, where, expected):
    task, store = gaps
    hits = gradindex.load(store.folder, task).proponents(0, k=12, where=where)
    assert sorted(hits.of(0)[0].tolist()) == expected


@pytest.mark.parametrize(("condition", "expected"), [("word", [2, 7]), ("number", [2, 5]), ("day", [3])])
def test_nothing_after_the_sign_asks_for_what_is_missing(gaps, condition, expected):
    task, store = gaps
    where = parse_where(store, [(condition, "")])
    hits = gradindex.load(store.folder, task).proponents(0, k=12, where=where)
    assert sorted(hits.of(0)[0].tolist()) == expected


def test_what_is_missing_differs_from_every_value_and_not_from_itself(gaps):
    task, store = gaps
    retriever = gradindex.load(store.folder, task)
    for name in ("word", "number"):
        found = retriever.proponents([0, 1], k=12, differs=name)
        missing = [2, 7] if name == "word" else [2, 5]
        assert sorted(found.of(1)[0].tolist()) == [i for i in range(12) if i not in missing]
        assert set(missing) < set(found.of(0)[0].tolist())


def test_where_asks_for_what_a_column_can_hold(gaps):
    task, store = gaps
    retriever = gradindex.load(store.folder, task)
    for where in ({"number": "1"}, {"number": True}, {"word": 3}, {"word": [["w1"]]}, {"number": torch.zeros(2, 2)}):
        with pytest.raises(ArgumentError, match="The column .* holds") as caught:
            retriever.proponents(0, k=12, where=where)
        assert "\n" not in str(caught.value)


def test_what_is_missing_is_shown_as_nothing(gaps):
    task, store = gaps
    hits = gradindex.load(store.folder, task).proponents(1, k=12)
    line = next(line for line in str(hits).splitlines() if line.split()[1:2] == ["2"])
    assert "nan" not in line and "None" not in line
    assert next(record for record in hits.records() if record["id"] == 2)["word"] == ""
    assert "nan" not in str(hits)


def test_dates_and_gaps_survive_all_that_happens_to_a_store(gaps, tmp_path):
    task, store = gaps
    expected = {name: store.column(name).tolist() for name in store.columns}
    grown = toys.make_task(
        tmp_path,
        n_train=15,
        columns={name: [*values, *values[:3]] for name, values in task.columns.items() if name != "day"}
        | {"day": np.concatenate([task.columns["day"], np.array(["2024-03-01T08:30"] * 3, dtype="M8[ns]")])},
    )
    with pytest.raises(gradindex.GradIndexError):  # toys draw other examples for another number
        gradindex.add(grown, store.folder)
    both = torch.utils.data.ConcatDataset([task.train, torch.utils.data.Subset(task.train, [0, 1, 2])])
    store = gradindex.add(replace(task, train=both, columns=grown.columns), store.folder)
    assert store.column("day").tolist() == [*expected["day"], *["2024-03-01T08:30:00"] * 3]
    store = gradindex.store.compact(gradindex.store.remove(store.folder, [0, 12]).folder)
    ids = np.array([2, 3, 13])
    assert store.column("day", ids).tolist() == ["2024-02-02", "", "2024-03-01T08:30:00"]
    assert store.column("word", ids).tolist() == ["", "w0", "w1"]
    np.testing.assert_array_equal(store.column("number", ids), [NAN, 0.0, 1.0])
    gradindex.store.export(store, tmp_path / "out.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert table["columns.day"].to_pylist() == store.column("day").tolist()
    gradindex.store.export(store, tmp_path / "out")
    assert np.load(tmp_path / "out" / "columns" / "day.npy").tolist() == store.column("day").tolist()
