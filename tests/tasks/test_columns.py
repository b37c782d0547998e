"""Values beside the examples: by place, whatever holds them; what is missing stays missing, dates stay dates."""

import array
import collections
import csv
import datetime
import enum
import functools
import io
import json
from dataclasses import replace

import h5py
import numpy as np
import pyarrow.parquet
import pytest
import torch
import toys
from click.testing import CliRunner

import gradindex
from gradindex.cli.main import main
from gradindex.columns import Column
from gradindex.dates import DATES, read_date
from gradindex.errors import ArgumentError, MismatchError, TaskError
from gradindex.gaps import with_gaps
from gradindex.growth import repair
from gradindex.output import date_text
from gradindex.projection import Projection
from gradindex.retrieval.filters import parse_where
from gradindex.retrieval.hits import make_cards
from gradindex.store.forms import check_manifest

OPTIONS = {"projection": Projection(dim=8), "batch_size": 4, "shard_rows": 4}
NAN = float("nan")
DAY = datetime.datetime


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
        # What is missing: NaN; an empty text is there.
        (["a", None, NAN], ["a", NAN, NAN], "U"),
        (["", None, "b"], ["", NAN, "b"], "U"),
        (np.array(["a", np.nan, None], dtype=object), ["a", NAN, NAN], "U"),
        ([1, None, 3], [1.0, NAN, 3.0], "<f8"),
        ([True, None, False], [1.0, NAN, 0.0], "<f8"),
        ([1.5, NAN, None], [1.5, NAN, NAN], "<f8"),
        ([None, None, None], [NAN, NAN, NAN], "<f8"),
        (np.ma.masked_array([1, 2, 3], mask=[False, True, False]), [1.0, NAN, 3.0], "<f8"),
        # Dates: moments to the microsecond.
        (
            np.array(["2024-01-31", "2023-02-01", "NaT"], dtype="datetime64[D]"),
            [DAY(2024, 1, 31), DAY(2023, 2, 1), None],
            DATES,
        ),
        (
            np.array(["2024-01-31T12:30", "2023-02-01", "2023-02-01T00:00:00.25"], dtype="datetime64[ns]"),
            [DAY(2024, 1, 31, 12, 30), DAY(2023, 2, 1), DAY(2023, 2, 1, 0, 0, 0, 250_000)],
            DATES,
        ),
        (np.array(["2024", "2023", "NaT"], dtype="datetime64[Y]"), [DAY(2024, 1, 1), DAY(2023, 1, 1), None], DATES),
        (np.array(["1969-12-31T23"] * 3, dtype=">M8[h]"), [DAY(1969, 12, 31, 23)] * 3, DATES),
        (
            np.array(["9999-12-31T23:59:59.999999", "0001-01-01", "1600-02-29"], dtype="datetime64[us]"),
            [DAY.max, DAY.min, DAY(1600, 2, 29)],
            DATES,
        ),
        (np.array([0, 10**12, 2 * 10**12]).astype("M8[as]"), [DAY(1970, 1, 1, 0, 0, 0, us) for us in range(3)], DATES),
        (np.array(["NaT"] * 3, dtype="datetime64[s]"), [None] * 3, DATES),
        (
            np.ma.masked_array(np.array(["2024", "2023", "2022"], dtype="M8[ns]"), mask=[False, True, False]),
            [DAY(2024, 1, 1), None, DAY(2022, 1, 1)],
            DATES,
        ),
        (
            [datetime.date(2024, 1, 31), datetime.datetime(2024, 1, 31, 8, 0, 0, 500_000), None],
            [DAY(2024, 1, 31), DAY(2024, 1, 31, 8, 0, 0, 500_000), None],
            DATES,
        ),
        (
            [datetime.datetime(2024, 1, 31, 1, tzinfo=zone(hours)) for hours in (0, 2, -3)],
            [DAY(2024, 1, 31, 1), DAY(2024, 1, 30, 23), DAY(2024, 1, 31, 4)],
            DATES,
        ),
        ([np.datetime64("2024-01-31"), np.datetime64("NaT", "D"), None] * 2, [DAY(2024, 1, 31), None, None] * 2, DATES),
    ],
)  # fmt: skip
def test_values_as_they_are_kept(values, expected, kind):
    every, found = taken(values)
    assert found == kind
    if kind == "U":
        every = with_gaps(np.array(every)).tolist()
        every, expected = gaps_as_none(every), gaps_as_none(expected)
    np.testing.assert_array_equal(every, expected)


def test_dates_as_text_are_as_short_as_they_can_be():
    assert [date_text(DAY(2024, 1, 31, *rest)) for rest in ((), (8,), (0, 0, 0, 250_000), (8, 30, 10))] == [
        "2024-01-31", "2024-01-31T08:00:00", "2024-01-31T00:00:00.25", "2024-01-31T08:30:10",
    ]  # fmt: skip
    assert date_text(datetime.date(9, 1, 1)) == "0009-01-01"


REFUSED = {
    "numbers as text among numbers": ([1, "2", 3], r"mixes integers \(at place 0\) and strings \(at place 1\)"),
    "fractions among texts": (["a", 1.5, "b"], r"mixes strings \(at place 0\) and floats \(at place 1\)"),
    "flags among numbers": ([True, 2, False], "mixes booleans .* and integers"),
    "dates among texts": (["a", datetime.date(2024, 1, 1), "b"], "mixes strings .* and dates"),
    "some zones": (
        [datetime.datetime(2024, 1, 1), datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc)],
        "with and without a time zone",
    ),
    "a day beside a zone": (
        [datetime.date(2024, 1, 1), datetime.datetime(2024, 1, 1, tzinfo=datetime.timezone.utc)],
        "with and without a time zone",
    ),
    "finer than microseconds": (
        np.array(["2024-01-31", "2024-01-31T08:00:00.000000001"], dtype="M8[ns]"),
        r"at place 1, holds the date 2024-01-31T08:00:00.000000001, .* the microsecond. Round it",
    ),
    "finer scalars": ([None, np.datetime64(1, "ps")], "at place 1, holds the date 1970.*000000000001, .*Round it"),
    "the lowest of nanoseconds": (np.array([1 - 2**63]).view("M8[ns]"), "the date 1677-09-21.*the microsecond"),
    "far years": (
        np.array(["NaT", "300000-01-01"], dtype="M8[D]"),
        "at place 1, holds a date of the year 300000, but .* years 1 to 9999. Give it as text",
    ),
    "the year 0": (np.array(["0000-12-31"], dtype="M8[D]"), "of the year 0,"),
    "beyond the years in UTC": (
        [datetime.datetime(1, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=3)))],
        "0001-01-01 00:00:00.03:00, in UTC, but",
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
    "inexact beside missing": ([2**53 + 1, None], "9007199254740993 with missing values.*as text"),
    "inexact beside fractions": ([2**60 + 1, 0.5], "with other numbers"),
    "no Unicode": (["a", "\udcff"], r"not Unicode .*at place 1"),
    "long": (["a", "b" * 70_000], r"a text of 70,000 bytes \(at place 1\), but at most 65,536"),
    "a zero character at the end": (["a\0", "b"], "ends in a NUL character"),
    "one text": ("abc", "is a str, a single text"),
    "a set": ({1, 2, 3}, "is a set, which has no order"),
    "a dict": ({0: "a", 1: "b"}, "is a dict, which has no order"),
    "a generator": ((i for i in range(3)), r"is a generator, which cannot be indexed.*list\(\.\.\.\)"),
    "one number": (3, "is a int, which cannot be indexed"),
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
        ({3: range(12)}, "has a column 3, but a name must be a string"),
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
        "category with gaps": (pd.Series(texts, dtype="category"), [NAN if t is None else t for t in texts]),
        "days": (days, None),
        "zoned": (zoned, [zoned[i].tz_convert("UTC").tz_localize(None).to_pydatetime() for i in range(12)]),
        "dates with gaps": (pd.Series([*days[:11], pd.NaT]), [*days[:11], None]),
        "objects that are dates": (pd.Series([*days[:11], pd.NaT], dtype=object), [*days[:11], None]),
        "dates of Arrow": (days.astype("timestamp[ms][pyarrow]"), list(days)),
        "nanoseconds": (days.as_unit("ns") + pd.Timedelta(microseconds=1), None),
        "objects with gaps": (pd.Series(texts, dtype=object), [NAN if t is None else t for t in texts]),
        "string": (pd.Series(texts, dtype="string"), [NAN if t is None else t for t in texts]),
        "Int64": (pd.Series([*range(11), None], dtype="Int64"), [*map(float, range(11)), NAN]),
        "Int64 whole": (pd.Series(range(12), dtype="Int64"), list(range(12))),
        "boolean": (pd.Series([True, False, None] * 4, dtype="boolean"), [1.0, 0.0, NAN] * 4),
        "Float64": (pd.Series([0.5, None, 1.0] * 4, dtype="Float64"), [0.5, NAN, 1.0] * 4),
        "sparse": (pd.Series(pd.arrays.SparseArray([0, 0, 1] * 4)), [0, 0, 1] * 4),
    }
    return {name: (values, values.tolist() if meant is None else meant) for name, (values, meant) in cases.items()}


def gaps_as_none(values):
    """NaN and NaT equal nothing, not even themselves."""
    return [None if value != value else value for value in values]


@pytest.mark.slow
def test_every_kind_of_pandas_series_is_stored_by_place(pd, tmp_path):
    cases = series(pd)
    task = toys.make_task(tmp_path, columns={name: values for name, (values, _) in cases.items()})
    store = gradindex.build(task, tmp_path / "store", **OPTIONS)
    for name, (_, meant) in cases.items():
        found = store.column(name)
        assert gaps_as_none(found.tolist()) == gaps_as_none(meant), name
    assert store.verify() == []
    # Of queries too, and a frame is a mapping of columns.
    frame = pd.DataFrame({"name": list("wxyz"), "day": pd.date_range("2024-01-31", periods=4)}, index=[3, 1, 0, 2])
    asked = replace(task, query_columns=frame).column_arrays("query", [2, 0])
    assert {name: values.tolist() for name, values in asked.items()} == {
        "name": ["y", "w"],
        "day": [pd.Timestamp("2024-02-02"), pd.Timestamp("2024-01-31")],
    }
    for values in (pd.MultiIndex.from_product([range(3), range(4)]), pd.period_range("2024-01", periods=12, freq="M")):
        with pytest.raises(TaskError, match="holds a (tuple|Period)"):
            replace(task, columns={"c": values})
    for values in (days := pd.date_range("2024", periods=12) + pd.Timedelta(nanoseconds=1), list(days)):
        with pytest.raises(TaskError, match="at place 0, holds the date .*01, .*Round it"):
            replace(task, columns={"c": values})
    with pytest.raises(TaskError, match="at place 0, holds a date of the year 20000"):
        replace(task, columns={"c": [pd.Timestamp(np.datetime64("20000-01-01", "s"))] * 12})
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
    queries["day"] = [datetime.date(2024, 1, 31), None, datetime.datetime(2024, 2, 1), np.datetime64("2024-02-02", "h")]
    task = toys.make_task(tmp_path, columns=columns, query_columns=queries)
    return task, gradindex.build(task, tmp_path / "store", **OPTIONS)


@pytest.mark.slow
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
        ({"day": datetime.datetime(2024, 2, 1, 8, tzinfo=zone(8))}, [1]),
        ({"day": ["2024-02-01T00:00", "2024-02-02T01:00+01:00", "2024-02-02T00:00:00Z"]}, [1, 2]),
        ({"day": [np.datetime64("NaT", "ns"), np.datetime64("2024-02-01T00:00:00.000000001")]}, [3]),
        ({"day": np.datetime64("300000-01-01")}, []),
        ({"day": {"2024-01-31": 0}.keys()}, [0]),
    ],
)
def test_a_filter_can_ask_for_dates_and_for_what_is_missing(gaps, where, expected):
    task, store = gaps
    hits = gradindex.load(task, store.folder).proponents(0, k=12, where=where)
    assert sorted(hits.of(0)[0].tolist()) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("condition", "expected"), [("word", [2, 7]), ("number", [2, 5]), ("day", [3])])
def test_nothing_after_the_sign_asks_for_what_is_missing(gaps, condition, expected):
    task, store = gaps
    where = parse_where(store, [(condition, "")])
    hits = gradindex.load(task, store.folder).proponents(0, k=12, where=where)
    assert sorted(hits.of(0)[0].tolist()) == expected


def test_what_is_missing_differs_from_every_value_and_not_from_itself(gaps):
    task, store = gaps
    retriever = gradindex.load(task, store.folder)
    for name, missing in {"word": [2, 7], "number": [2, 5], "day": [3]}.items():
        found = retriever.proponents([0, 1], k=12, differs=name)
        assert sorted(found.of(1)[0].tolist()) == [i for i in range(12) if i not in missing]
        assert set(missing) < set(found.of(0)[0].tolist())
    assert sorted(retriever.proponents(2, k=12, differs="day").of(0)[0].tolist()) == [0, *range(2, 12)]
    texts = replace(task, query_columns={"day": ["2024-01-31"] * 4})
    with pytest.raises(ArgumentError, match="The column day holds dates, .* and text for queries"):
        gradindex.load(texts, store.folder).proponents(0, k=3, differs="day")


def test_where_asks_for_what_a_column_can_hold(gaps):
    task, store = gaps
    retriever = gradindex.load(task, store.folder)
    for where in ({"number": "1"}, {"number": True}, {"word": 3}, {"word": [["w1"]]}, {"number": torch.zeros(2, 2)},
        {"day": "yesterday"}, {"day": "2024-02-30"}, {"day": 20240131}, {"day": [True]}):  # fmt: skip
        with pytest.raises(ArgumentError, match="The column .* holds") as caught:
            retriever.proponents(0, k=12, where=where)
        assert "\n" not in str(caught.value)


def test_what_is_missing_is_shown_as_nothing(gaps):
    task, store = gaps
    hits = gradindex.load(task, store.folder).proponents(1, k=12)
    line = next(line for line in str(hits).splitlines() if line.split()[1:2] == ["2"])
    assert "nan" not in line and "None" not in line
    assert next(record for record in hits.records() if record["id"] == 2)["word"] is np.nan
    assert "nan" not in str(hits)
    gone = next(record for record in hits.records() if record["id"] == 3)["day"]
    assert gone is None and "NaT" not in str(hits) and "1970" not in str(hits)


def test_dates_are_dates_in_records_and_short_text_where_they_are_shown(tmp_path):
    noon = np.array("2024-01-31T12:00", "M8[s]") + np.arange(12) * np.timedelta64(12, "h")
    noon[5] = "NaT"
    task = toys.make_task(tmp_path, columns={"at": noon}, query_columns={"at": noon[:4]})
    store = gradindex.build(task, tmp_path / "store", **OPTIONS)
    hits = gradindex.load(task, store.folder).proponents([0, 1], k=12)
    texts = {0: "2024-01-31T12:00:00", 1: "2024-02-01", 3: "2024-02-02", 5: ""}
    assert {r["id"]: r["at"] for r in hits.records()} == dict(enumerate(noon.tolist()))
    assert f"({'at 2024-01-31T12:00:00'}" in str(hits) and "(at 2024-02-01" in str(hits)
    for line in (line.split() for line in str(hits).splitlines()):
        if len(line) > 2 and line[0].isdigit() and int(line[1]) in texts:
            assert line[3:] == [texts[int(line[1])]] * (int(line[1]) != 5)
    tiles = [tile for card in make_cards([hits]) for tile in card.rows["proponents"]]
    assert {tile.title: tile.lines for tile in tiles}["id 1"] == ["at 2024-02-01"]
    assert {tile.title: tile.lines for tile in tiles}["id 5"] == []
    # A shorter answer ends with no date, not with one of 1970.
    either = gradindex.load(task, store.folder).proponents([0, 1], k=12, differs="at", where={"at": noon[[0, 2]]})
    assert either.counts.tolist() == [1, 2] and np.isnat(either.columns["at"][0, 1])
    show = lambda *form: CliRunner().invoke(main, ["self-influence", str(store.folder), "-k", "all", *form])  # noqa: E731
    records = json.loads(show("--json").stdout)["records"]
    assert {i: r["at"] for r in records if (i := r["id"]) in texts} == texts | {5: None}
    for raw in ("--csv", "--raw-csv"):
        rows = csv.DictReader(io.StringIO(show(raw).stdout))
        assert {i: row["at"] for row in rows if (i := int(row["id"])) in texts} == texts
    table = {int(line.split()[1]): line.split()[3:] for line in show().stdout.splitlines()[1:-1]}
    assert {i: table[i] for i in texts} == {i: [text] if text else [] for i, text in texts.items()}
    found = show("--where", "at=2024-02-02", "--where", "at=2024-01-31 13:00+01:00", "--where", "at=", "--json")
    assert sorted(record["id"] for record in json.loads(found.stdout)["records"]) == [0, 3, 5]
    refused = show("--where", "at=Friday")
    assert refused.exit_code and "holds dates, such as 2024-01-31 or" in refused.stderr


def test_what_is_missing_is_an_empty_cell_and_null(gaps):
    _, store = gaps
    show = lambda form: CliRunner().invoke(main, ["self-influence", str(store.folder), "-k", "all", form]).stdout  # noqa: E731
    rows = {int(row["id"]): row for row in csv.DictReader(io.StringIO(show("--csv")))}
    assert [rows[2][name] for name in ("word", "number", "day")] == ["", "", "2024-02-02"]
    assert [rows[3][name] for name in ("word", "number", "day")] == ["w0", "0.0", ""]
    records = {record["id"]: record for record in json.loads(show("--json"))["records"]}
    assert [records[2]["word"], records[2]["number"], records[3]["day"]] == [None] * 3


def test_a_store_of_dates_says_so_and_other_readers_open_it(gaps):
    _, store = gaps
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert manifest["columns"]["day"] == "<M8[us]" and manifest["needs"] == ["dates"]
    for path in sorted((store.folder / "shards").glob("*.h5")):
        with h5py.File(path) as file:
            days = file["columns/day"]
            assert days.dtype == np.dtype("<i8")
            np.testing.assert_array_equal(days[:].view("M8[us]"), store.column("day", file["ids"][:]))
    assert store.column("day", np.empty(0, dtype=np.int64)).dtype == np.dtype("<M8[us]")
    del manifest["sha256"]
    with pytest.raises(ValueError, match='needs lacks "dates"'):
        check_manifest(manifest | {"needs": []})
    for kind in ("<M8[ns]", "<m8[s]", "M8"):
        with pytest.raises(ValueError, match="columns.day is"):
            check_manifest(manifest | {"columns": {"day": kind}})


def test_a_change_of_a_date_is_seen_and_a_gap_is_none(gaps):
    task, store = gaps
    assert gradindex.add(task, store.folder).n_train == 12  # NaT is NaT
    changed = task.columns["day"].copy()
    changed[4] += 1
    assert replace(task, columns={**task.columns, "day": changed}).data_fingerprint() != task.data_fingerprint()
    for days in (changed, np.where(np.isnat(changed), "", changed.astype(str))):
        with pytest.raises(MismatchError, match=r"columns differ \(day\)"):
            gradindex.add(replace(task, columns={**task.columns, "day": days}), store.folder)


@pytest.mark.slow
def test_stores_of_dates_merge_and_shards_of_them_are_repaired(gaps, tmp_path):
    task, store = gaps
    build = lambda ids, name: gradindex.build(  # noqa: E731
        replace(task, train=torch.utils.data.Subset(task.train, ids), columns={"day": task.columns["day"][ids]}),
        tmp_path / name, **OPTIONS,
    )  # fmt: skip
    one, other = build(list(range(5)), "one"), build(list(range(5, 12)), "other")
    merged = gradindex.store.merge(one.folder, other.folder, offset=5)
    assert merged.column("day").tolist() == task.columns["day"].astype("M8[us]").tolist()
    assert merged.manifest.needs == ["dates"] and merged.verify() == []
    shard = sorted((store.folder / "shards").glob("*.h5"))[1]
    shard.write_bytes(b"\0" * shard.stat().st_size)
    assert len(store.verify()) == 1
    assert len(repair(task, store.folder)) == 1
    repaired = gradindex.GradientStore(store.folder)
    assert repaired.verify() == []
    assert repaired.column("day").tolist() == task.columns["day"].astype("M8[us]").tolist()


@pytest.mark.parametrize(
    "text", ["2024", "2024-02-30", "today", "31.01.2024", "2024-01-31T08:30:00.1234567", "2024-01-31Z", ""]
)
def test_texts_that_are_no_dates(text):
    with pytest.raises(ValueError, match="is no date|out of range"):
        read_date(text)


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
    assert store.column("day").tolist() == [*expected["day"], *[DAY(2024, 3, 1, 8, 30)] * 3]
    store = gradindex.store.compact(gradindex.store.remove(store.folder, [0, 12]).folder)
    ids = np.array([2, 3, 13])
    assert store.column("day", ids).tolist() == [DAY(2024, 2, 2), None, DAY(2024, 3, 1, 8, 30)]
    assert store.column("word", ids).tolist() == [np.nan, "w0", "w1"]
    np.testing.assert_array_equal(store.column("number", ids), [NAN, 0.0, 1.0])
    gradindex.store.export(store, tmp_path / "out.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert str(table["day"].type) == "timestamp[us]"
    assert table["day"].to_pylist() == store.column("day").tolist()
    gradindex.store.export(store, tmp_path / "out")
    assert np.load(tmp_path / "out" / "columns" / "day.npy").tolist() == store.column("day").tolist()
