"""A question stands in one place: as an object, as keywords, as JSON and on the command line."""

import datetime
import json

import click
import numpy as np
import pytest
import torch
import toys

import gradindex
from gradindex import Question
from gradindex.cli import main
from gradindex.errors import ArgumentError

QUESTIONS = [
    Question(),
    Question(kind="absolute", k=3, rerank="rows"),
    Question(k=5, candidates=40, source="train", aggregate="mean"),
    Question(at_least=-0.5, ids=[3, 1, 2], where={"label": ["a", "b"], "day": "2024-01-31"}, differs="label"),
]


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_survives_json(question):
    assert Question.from_dict(json.loads(json.dumps(question.to_dict()))) == question


def test_what_json_lacks_is_written_as_the_store_takes_it():
    day = np.datetime64("2024-01-31T08:30")
    where = {"n": torch.tensor([1, 2]), "day": [datetime.date(2024, 1, 31), day], "word": ("a", "b")}
    written = Question(ids=np.array([4, 2]), where=where).to_dict()
    assert written == {
        "ids": [4, 2],
        "where": {"n": [1, 2], "day": ["2024-01-31", "2024-01-31T08:30"], "word": ["a", "b"]},
    }
    json.dumps(written)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"at_leats": 1}, "A question has no field 'at_leats'. It has: kind, k, at_least"),
        ([("k", 3)], "A question is a list, but must be a mapping"),
        ({"k": "three"}, "k is 'three', a str, but must be an integer"),
        ({"k": True}, "k is True, a bool, but must be an integer"),
        ({"kind": "both"}, r"kind is 'both', but must be one of: proponents, opponents, absolute. For both, call both"),
        ({"rerank": "exact", "at_least": "nan"}, "at_least is NaN"),
        ({"rerank": "rows", "candidates": 5}, "candidates needs rerank='exact'"),
        ({"source": "test"}, "source is 'test', but must be 'query' or 'train'"),
        ({"aggregate": "max"}, "aggregate is 'max', but must be 'sum', 'mean' or None"),
    ],
)
def test_a_question_that_cannot_be_is_refused(value, message):
    with pytest.raises(ArgumentError, match=message):
        Question.from_dict(value)


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    folder = tmp_path_factory.mktemp("question")
    task = toys.make_task(folder, columns={"word": [f"w{i % 3}" for i in range(12)]})
    gradindex.build(task, folder / "store", factors="float32")
    return gradindex.load(task, folder / "store")


@pytest.mark.slow
def test_keywords_and_a_question_give_the_same_answer(retriever):
    options = {"kind": "opponents", "k": 4, "where": {"word": ["w0", "w1"]}}
    by_keywords = retriever.search([0, 3], **options)
    by_question = retriever.answer([0, 3], Question.from_dict(options))
    np.testing.assert_array_equal(by_keywords.ids, by_question.ids)
    np.testing.assert_array_equal(by_keywords.scores, by_question.scores)
    assert by_keywords.to_dict() == by_question.to_dict()


def test_the_command_line_has_every_field_of_a_question():
    """Positions, where, ids and kind have options of their own."""
    names = {parameter.name for parameter in main.commands["query"].params}
    assert {"k", "at_least", "rerank", "candidates", "where", "ids_file", "differs", "aggregate", "kind"} <= names
    rerank = next(p for p in main.commands["query"].params if p.name == "rerank")
    assert isinstance(rerank.type, click.Choice) and list(rerank.type.choices) == ["exact", "wide", "rows", "none"]


def test_hits_as_a_dictionary_are_plain_json(retriever):
    up, down = retriever.both([0, 3], 2)
    said = up.to_dict(down)
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    assert list(said) == ["note", "scored", "stages", "records"] and said["scored"] == "exact"
    assert [(r["query"], r["kind"], r["rank"]) for r in said["records"]][:3] == [
        ("query 0", "proponents", 1), ("query 0", "proponents", 2), ("query 3", "proponents", 1),
    ]  # fmt: skip
    assert [r["id"] for r in said["records"]] == [*up.ids.ravel().tolist(), *down.ids.ravel().tolist()]


def test_old_names_and_orders_work_and_say_what_to_write(retriever):
    task, folder = retriever.task, retriever.store.folder
    with pytest.warns(DeprecationWarning, match=r"write load\(task, folder\)") as caught:
        again = gradindex.load(folder, task)
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"write Retriever\(task, store\)"):
        gradindex.Retriever(retriever.store, task)
    with pytest.warns(DeprecationWarning, match=r"write Retriever\.prepare") as caught:
        prepared = again.ask([0])
    assert caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"write Retriever\.explain"):
        explanation = again.split(prepared, [3])
    np.testing.assert_allclose(explanation.scores.sum(), retriever.exact_scores([0])[0, 3], rtol=1e-5)
    with pytest.warns(DeprecationWarning, match=r"write manifest\.next_id"):
        assert retriever.store.manifest["next_id"] == 12
