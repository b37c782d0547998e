"""How answers look: as a table, in a notebook, as a page."""

import base64
import io
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from gradindex.errors import ArgumentError, DependencyError, StoreError
from gradindex.output import table
from gradindex.report import Section, heat_map, line_chart, picture, write_page
from gradindex.retrieval.hits import Hits, as_text

UP = Hits(
    ids=np.array([[3, 12], [0, 7]]),
    scores=np.array([[2.5, 0.125], [1.0, -0.5]]),
    kind="proponents",
    scored="exact",
    queries=("query 4", "query 9"),
    columns={"label": np.array([["cat", "<b>"], ["dog", "cat"]]), "flipped": np.array([[True, False], [False, False]])},
    query_columns={"label": np.array(["dog", "cat"])},
)
SIGN = (
    "exact TracInCP scores; positive score = training on this example lowered the loss on the query (proponent); "
    "negative = raised it (opponent)"
)


def shown(hits, show):
    return Hits(**(vars(hits) | {"show_train": show, "show_query": show}))


class Tags(HTMLParser):
    """Collects pictures and text, and fails on tags that are not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.pictures, self.text, self.remote = [], [], "", []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag == "img":
            self.pictures.append(values["src"])
        self.remote += [v for k, v in attributes if k in ("src", "href") and not v.startswith("data:")]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def decode(address):
    kind, _, content = address.partition(",")
    assert kind == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"))


def test_hits_print_as_tables_with_the_sign_explained():
    assert str(UP) == (
        "query 4 (label dog): proponents\n"
        "rank  id  score  label  flipped\n"
        "   1   3    2.5  cat       True\n"
        "   2  12  0.125  <b>      False\n"
        "\n"
        "query 9 (label cat): proponents\n"
        "rank  id  score  label  flipped\n"
        "   1   0      1  dog      False\n"
        "   2   7   -0.5  cat      False\n"
        "\n" + SIGN
    )


def test_texts_and_rows_stand_beside_the_hits_in_short():
    words = shown(UP, lambda i: {"age": i, "rate": 0.5} if i == 12 else f"{i} " + "word " * 20)
    lines = str(words).splitlines()
    assert lines[0] == f'query 4 (label dog, "0 {"word " * 11}..."): proponents'
    assert lines[2].endswith(f"True  3 {'word ' * 11}...")
    assert lines[3].endswith("False  age 12, rate 0.5")


def test_several_answers_stand_together_query_by_query():
    down = Hits(**(vars(UP) | {"kind": "opponents"}))
    headings = [line for line in as_text([UP, down]).splitlines() if line.startswith("query")]
    assert [heading.rpartition(" ")[2] for heading in headings] == ["proponents", "opponents"] * 2


def test_records_are_plain_python_values():
    assert UP.records()[1] == {
        "query": "query 4", "kind": "proponents", "rank": 2, "id": 12, "score": 0.125, "label": "<b>", "flipped": False,
    }  # fmt: skip
    assert {type(value) for value in UP.records()[0].values()} == {str, int, float, bool}


def test_the_first_queries_and_hits_are_a_part_of_the_answer():
    assert UP.first(1, 1).records() == UP.records()[:1]


def test_an_empty_table_says_so():
    assert table([]) == "(nothing)"


def test_a_notebook_without_show_gets_the_escaped_table():
    html = UP._repr_html_()
    assert "&lt;b&gt;" in html
    assert "<b>" not in html


def test_a_notebook_shows_pictures_texts_and_rows():
    def show(i):
        return [{"age": 3, "rate": 0.25}, "a <text>", None, np.full((2, 2), i / 12)][i % 4]

    page = Tags(shown(UP, show)._repr_html_())
    assert len(page.pictures) == 2  # ids 3 and 7
    for text in ("a <text>", "age", "0.25", "label cat", "label <b>", "+2.5", "-0.5", "flipped", SIGN):
        assert text in page.text
    assert page.text.count("flipped") == 1  # a badge where it is true alone


def test_a_notebook_without_the_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    html = shown(UP, str)._repr_html_()
    assert "gradindex[demo]" in html
    assert "rank  id" in html
    with pytest.raises(DependencyError, match=r"pip install 'gradindex\[demo\]'"):
        UP.save_html("page.html")


@pytest.mark.slow
def test_a_saved_page_holds_everything_inside(tmp_path):
    down = Hits(**(vars(UP) | {"kind": "opponents"}))
    shown(UP, lambda i: np.full((3, 3), i)).save_html(tmp_path / "page.html", down)
    page = Tags((tmp_path / "page.html").read_text())
    assert page.remote == []
    assert len(page.pictures) == 6
    assert [page.text.count(kind) for kind in ("proponents", "opponents")] == [2, 2]
    with pytest.raises(StoreError, match=r"cannot be written.*another path"):
        UP.save_html(tmp_path / "no folder" / "page.html")


def test_pictures_keep_their_values():
    grey = np.array([[0, 128], [255, 64]], dtype=np.uint8)
    assert decode(picture(grey))[:, :, 0].tolist() == grey.tolist()
    colour = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    assert np.array_equal(decode(picture(colour)), colour)
    assert np.array_equal(decode(picture(Image.fromarray(colour))), colour)
    assert np.array_equal(decode(picture(colour / 255)), colour)
    assert decode(picture(np.array([[-3.0, 5.0]])))[0, :, 0].tolist() == [0, 255]
    assert decode(picture(np.array([[True, False]])))[0, :, 0].tolist() == [255, 0]
    assert decode(picture(np.array([[[7], [9]]], dtype=np.uint8)))[0, :, 0].tolist() == [7, 9]


def test_a_picture_with_channels_first_is_refused():
    with pytest.raises(ArgumentError, match=r"\(3, 8, 8\), but a picture needs \(h, w\)"):
        picture(np.zeros((3, 8, 8)))


def test_a_page_escapes_what_it_shows_and_leaves_out_what_is_empty(tmp_path):
    curve = line_chart([0, 0.5, 1], {"found": np.array([0, 0.9, 1]), "chance": np.array([0, 0.5, 1])}, "seen", "found")
    sections = [
        Section("A <title>", table=[{"name": "<x>", "value": 0.123456}]),
        Section("B", figure=curve, caption="C"),
    ]
    write_page(tmp_path / "page.html", "T & T", "lead", sections)
    text = (tmp_path / "page.html").read_text()
    assert "<x>" not in text
    page = Tags(text)
    assert "A <title>" in page.text
    assert "0.1235" in page.text
    assert decode(page.pictures[0]).shape[2] == 3
    assert re.findall(r"gi-card", text) == []


@pytest.mark.slow
def test_a_heat_map_shows_signs_and_has_room_for_long_names():
    pixels = decode(heat_map(np.array([[1.0, -1.0], [0.0, 0.0]]), ["0 a.pt", "1 b.pt"], ["x" * 70, "y"])).reshape(-1, 3)
    for colour in ((10, 125, 79), (194, 65, 12)):
        assert (np.abs(pixels.astype(int) - colour).max(1) <= 2).sum() > 500
    decode(heat_map(np.zeros((1, 300)), ["0 a.pt"], [f"layer.{i}.weight" for i in range(300)]))
