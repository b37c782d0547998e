"""The demo, from training to its report."""

import re
import sys

import numpy as np
import pytest
from places import TOP
from toys import call

import gradindex
from gradindex import demo
from gradindex.evaluation import recall_at_k, share_found


@pytest.fixture
def few_digits(monkeypatch):
    """A demo of 120 digits, within a second."""
    digits = demo.digits()
    monkeypatch.setattr(demo, "digits", lambda: {name: values[:120] for name, values in digits.items()})
    monkeypatch.setattr(demo, "EPOCHS", 8)


def test_a_tenth_of_the_labels_is_flipped_to_another_label():
    with (TOP / "data" / "digits.npz").open("rb") as file, np.load(file) as archive:
        images, truth = archive["images"], archive["labels"]
    data = demo.digits()
    assert (len(data["images"]), len(data["query_images"]), data["flipped"].sum()) == (1400, 397, 140)
    by_picture = {image.tobytes(): label for image, label in zip(images, truth, strict=True)}
    true_labels = np.array([by_picture[(image[0] * 16).astype(np.uint8).tobytes()] for image in data["images"]])
    assert np.array_equal(data["labels"] != true_labels, data["flipped"])
    queries = [by_picture[(image[0] * 16).astype(np.uint8).tobytes()] for image in data["query_images"]]
    assert data["query_labels"].tolist() == queries


def test_it_ends_with_the_path_of_its_report(demo_run):
    out, printed = demo_run
    assert out.parent / printed.splitlines()[-1] == out / "report.html"


def test_it_finds_the_flipped_digits_and_says_what_it_measured(demo_run):
    out, printed = demo_run
    store = gradindex.GradientStore(out / "store")
    found = share_found(store.self_influence().sum(1), store.column("flipped"), [0.1, 0.2, 0.3])
    assert found[1] >= 0.8
    assert re.search(r"self-influence +" + " +".join(f"{share:.1%}" for share in found), printed)
    last = share_found(store.losses()[:, -1], store.column("flipped"), [0.1])[0]
    assert re.search(rf"loss, last checkpoint +{last:.1%}", printed)
    assert re.search(r"chance +10.0% +20.0% +30.0%", printed)


@pytest.mark.slow
def test_its_agreement_with_exact_scores_is_measured(demo_run):
    out, printed = demo_run
    task = demo.make_task(out)
    queries = [task.query[i] for i in range(task.n_query)]
    truth = gradindex.exact_scores(task, queries)
    hits = gradindex.load(task, out / "store").proponents(queries, k=100, rerank="none")
    at_10, at_100 = (recall_at_k(truth, hits.ids[:, :k], k).mean() for k in (10, 100))
    assert re.search(rf"the index alone +{at_10:.5g} +{at_100:.5g}", printed)
    assert at_10 > 0.9


def test_the_report_shows_wrong_and_right_predictions_with_their_hits(demo_run):
    out, _ = demo_run
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64") == 6 * (1 + 2 * 8) + 1
    wrong = re.findall(r"<div>label (\d)</div>\s*<div>predicted (\d)</div>", page)
    assert [label != predicted for label, predicted in wrong] == [True] * 3 + [False] * 3
    assert "http" not in re.sub(r'"data:[^"]*"', "", page)


def test_its_store_can_be_asked_from_the_command_line(demo_run):
    out, _ = demo_run
    command = ["query", str(out / "store"), "--task", f"{out / 'task.py'}:task", "--position", "0", "-k", "2"]
    result = call(*command)
    assert result.output.startswith("query 0 (label 2, predicted 2): proponents\nrank")


def test_without_its_extra_it_says_so_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    result = call("demo", "--out", tmp_path / "out")
    assert (result.exit_code, (tmp_path / "out").exists()) == (1, False)
    assert "pip install 'gradindex[demo]'" in result.output


@pytest.mark.slow
def test_it_starts_anew_in_its_own_folder_and_touches_no_other(few_digits, tmp_path):
    out = tmp_path / "out"
    assert call("demo", "--out", out).exit_code == 0
    before = (out / "store" / "manifest.json").stat().st_mtime_ns
    assert call("demo", "--out", out).exit_code == 0
    assert (out / "store" / "manifest.json").stat().st_mtime_ns > before
    (tmp_path / "thesis.txt").write_text("mine")
    result = call("demo", "--out", tmp_path)
    assert (result.exit_code, (tmp_path / "thesis.txt").read_text()) == (1, "mine")
    assert result.output.startswith(f"Error: {tmp_path} is not empty and holds no earlier demo.")
