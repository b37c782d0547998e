"""Names of implementations, and the words to choose from."""

import pytest

from gradindex.errors import ArgumentError
from gradindex.registry import Registry


@pytest.fixture
def shapes():
    made = Registry("shape")
    made.register("square")(4)
    made.register("line")(2)
    return made


def test_a_registry_is_a_mapping_in_the_order_of_registration(shapes):
    assert dict(shapes) == {"square": 4, "line": 2} and list(shapes) == ["square", "line"] and len(shapes) == 2


def test_registering_leaves_a_class_as_it_is(shapes):
    @shapes.register("circle")
    class Circle:
        pass

    assert shapes["circle"] is Circle and isinstance(Circle, type)


def test_a_name_is_given_once(shapes):
    with pytest.raises(ValueError, match="There is a shape 'line' already: 2"):
        shapes.register("line")(3)
    assert shapes["line"] == 2


@pytest.mark.parametrize("name", ["lime", None, ["line"]])
def test_an_unknown_name_is_refused_and_the_known_ones_are_told(shapes, name):
    with pytest.raises(ArgumentError) as refused:
        shapes.check(name)
    assert str(refused.value) == f"shape is {name!r}, but must be one of: square, line."


def test_a_known_name_passes(shapes):
    shapes.check("square")
