"""Options of a build stand in one place: as an object, as keywords and on the command line."""

from dataclasses import fields

import click
import pytest
import toys

import gradindex
from gradindex import BuildOptions
from gradindex.cli import main
from gradindex.errors import ArgumentError
from gradindex.options import BuildKeywords, ComputeKeywords, ComputeOptions
from gradindex.projection import Projection
from gradindex.retrieval.question import Question, SearchKeywords


def test_options_and_keywords_build_the_same_store(tmp_path):
    task = toys.make_task(tmp_path)
    options = BuildOptions(projection=Projection(dim=7), row_type="float16", factors="float32", batch_size=4)
    stores = [
        gradindex.build(task, tmp_path / "a", options=options),
        gradindex.build(task, tmp_path / "b", options=BuildOptions(batch_size=4, row_type="int8"),
                        projection=Projection(dim=7), row_type="float16", factors="float32"),
    ]  # fmt: skip
    assert stores[0].manifest == stores[1].manifest
    assert stores[0].manifest.row_type == "float16" and stores[0].has_factors


def test_a_build_can_be_given_a_part(tmp_path):
    task, options = toys.make_task(tmp_path), BuildOptions(batch_size=4, shard_rows=4)
    for number in (1, 2):
        assert gradindex.build(task, tmp_path / "store", options=options, part=(number, 2)) is None
    assert gradindex.store.seal(tmp_path / "store").n_train == 12


def test_growth_takes_where_and_how_to_compute_and_nothing_else(tmp_path):
    task = toys.make_task(tmp_path)
    store = gradindex.build(task, tmp_path / "store")
    assert gradindex.add(task, store.folder, options=BuildOptions(row_type="int8").computing).n_train == 12
    assert gradindex.add(task, store.folder, options=ComputeOptions(workers=0), device="cpu").n_train == 12
    with pytest.raises(TypeError, match="row_type"):
        gradindex.add(task, store.folder, row_type="int8")
    with pytest.raises(ArgumentError, match="options is a dict, but must be BuildOptions"):
        gradindex.build(task, store.folder, options={"row_type": "int8"})


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        (ComputeOptions, ComputeKeywords),
        (BuildOptions, BuildKeywords),
        (Question, SearchKeywords),
    ],
)
def test_fields_and_keywords_are_the_same(options, keywords):
    names = {each.name for each in fields(options)} - ({"k"} if options is Question else set())
    assert set(keywords.__annotations__) == names  # inherited ones as well


def test_the_command_line_has_every_option_of_a_build():
    parameters = {parameter.name: parameter for parameter in main.commands["build"].params}
    assert {each.name for each in fields(BuildOptions)} <= parameters.keys()
    assert isinstance(parameters["precision"].type, click.Choice)
    for command in ("add", "add-checkpoint"):
        names = {parameter.name for parameter in main.commands[command].params}
        assert {each.name for each in fields(ComputeOptions)} <= names
