"""Recipes run from top to bottom, give answers that make sense, and exact scores as plain autograd has them.

Pages on real data read it where it is (GRADINDEX_DATA), and made-up data of the same form everywhere. The pages on
language models and on Captum are run by test_docs.py, with the same checks.
"""

import math
import re
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from frameworks import imported
from pages import RECIPES, blocks
from places import DATA, TOP
from reference import check_scores

import gradindex

SIGN = "positive score = training on this example lowered the loss"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run a page in an empty folder of its own, in this process; its names, and what its blocks printed."""
    monkeypatch.chdir(tmp_path)

    def page(name):
        names, printed = {"__name__": "recipe"}, []
        for language, text in blocks(TOP / "docs" / "recipes" / name):
            assert language == "python"
            exec(compile(text, name, "exec"), names)
            printed.append(capsys.readouterr().out)
        return names, printed

    return page


def stand_in(monkeypatch):
    monkeypatch.syspath_prepend(TOP / "scripts" / "tasks")
    import stand_in

    return stand_in


def data_file(name, given, monkeypatch, path):
    """Put a table of the shared data to where a page reads it, or made-up rows of the same form."""
    if given == "made up":
        getattr(stand_in(monkeypatch), name.partition(".")[0])(path)
    elif not (DATA / name).exists():
        pytest.skip(f"needs {DATA}/{name} (GRADINDEX_DATA)")
    else:
        shutil.copy(DATA / name, path)


def mnist_folders(given, monkeypatch, folder, n_train=30, n_test=2):
    """``train/<digit>/*.png`` and ``test/<digit>/*.png`` with a few pictures of each digit; of MNIST its test set."""
    places = [f"{part}/{{}}/{i}.png" for part, n in (("train", n_train), ("test", n_test)) for i in range(n)]
    left = {str(digit): [folder / place.format(digit) for place in places] for digit in range(10)}
    for path in (path for paths in left.values() for path in paths):
        path.parent.mkdir(parents=True, exist_ok=True)
    if given == "made up":
        from PIL import Image

        arrays = stand_in(monkeypatch).images("mnist")
        for picture, label in zip(arrays["train_images"], arrays["train_labels"], strict=True):
            if left[str(label)]:
                Image.fromarray(picture).save(left[str(label)].pop(0))
    elif not (DATA / "mnist.tar.xz").exists():
        pytest.skip(f"needs {DATA}/mnist.tar.xz (GRADINDEX_DATA)")
    else:
        with tarfile.open(DATA / "mnist.tar.xz") as archive:
            for member in archive:
                if member.name.startswith("test/") and member.isfile() and left[member.name.split("/")[1]]:
                    left[member.name.split("/")[1]].pop(0).write_bytes(archive.extractfile(member).read())
                if not any(left.values()):
                    break
    assert not any(left.values())


GIVEN = pytest.mark.parametrize("given", ["real data", "made up"])


@pytest.mark.parametrize("name", RECIPES)
def test_the_first_answer_is_at_most_12_lines_after_the_training(name):
    (part,) = re.findall(r"^## Ask\n(.*?)(?=^## |\Z)", (TOP / "docs" / "recipes" / name).read_text(), re.M | re.S)
    (block,) = re.findall(r"^```python\n(.*?)^```", part, re.M | re.S)
    assert 4 <= len([line for line in block.splitlines() if line.strip()]) <= 12
    assert "gradindex.build" in block
    assert "proponents(" in block


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers
@GIVEN
def test_a_trainer_of_transformers(run, tmp_path, monkeypatch, given):
    imported("transformers").BertForSequenceClassification  # noqa: B018  # loaded here, where it is made to load
    data_file("ag_news_7600.csv", given, monkeypatch, tmp_path / "ag_news.csv")
    names, printed = run("huggingface.md")
    task = names["task"]
    assert SIGN in printed[-1]
    assert task.show(task.query[0]) in printed[-1]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 5
    # 120 steps of a linear schedule; a step uses the rate that the steps before it led to.
    check_scores(task, [0.005 * (1 - (one.step - 1) / 120) for one in task.checkpoints])
    assert shares_of_the_label(task, names["topics"]) > 0.5


def shares_of_the_label(task, words=None, n=10):
    """How many of the first ``n`` queries' best five proponents have the query's label."""
    hits = gradindex.load(task, "store").proponents(range(n), k=5)
    labels = [item["labels"] if isinstance(item, dict) else int(item[1]) for item in (task.query[i] for i in range(n))]
    return np.mean(hits.columns["label"] == np.array([words[i] if words else i for i in labels])[:, None])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning
@GIVEN
def test_a_trainer_of_lightning(run, tmp_path, monkeypatch, given):
    imported("lightning")
    pytest.importorskip("PIL")
    mnist_folders(given, monkeypatch, tmp_path / "mnist")
    names, printed = run("lightning.md")
    assert SIGN in printed[-1]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 10
    check_scores(names["task"], [0.05] * 5)
    assert shares_of_the_label(names["task"]) > 0.6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers
@GIVEN
def test_an_adapter(run, tmp_path, monkeypatch, given):
    imported("peft")
    imported("transformers").GPT2LMHeadModel  # noqa: B018  # loaded here, where it is made to load
    data_file("ag_news_7600.csv", given, monkeypatch, tmp_path / "ag_news.csv")
    names, printed = run("lora.md")
    assert SIGN in printed[1]
    hits = names["retriever"].proponents(range(10), k=5)
    topics = np.array([text.split()[-1] for text in names["texts"][120:130]])
    assert np.mean(hits.columns["topic"] == topics[:, None]) > 0.6
    assert printed[2].count("lora_A.default") == 4  # two matrices in each of two layers, and no base
    check_scores(names["task"], [0.01] * 4)


@pytest.mark.slow
def test_a_folder_that_timm_wrote(run):
    names, printed = run("folder.md")
    assert SIGN in printed[1]
    found = int(re.match(r"(\d+) of the first 40 have a wrong label, of 40", printed[2])[1])
    assert found > 20  # four by chance
    check_scores(names["task"], [0.1 * (1 + math.cos(math.pi * epoch / 6)) / 2 for epoch in range(5)])


@pytest.mark.slow
@GIVEN
def test_a_table(run, tmp_path, monkeypatch, given):
    pytest.importorskip("pandas")
    data_file("california_housing.csv", given, monkeypatch, tmp_path / "california_housing.csv")
    names, printed = run("table.md")
    assert SIGN in printed[1]
    inland = names["inland"]
    assert list(inland["kind"]) == ["proponents"] * 5 + ["opponents"] * 5
    train = names["train"]
    assert set(train["ocean_proximity"].iloc[inland["id"]]) == {"INLAND"}
    np.testing.assert_array_equal(train["price"].iloc[inland["id"]], inland["price"])  # by place, not by index
    moved = gradindex.load(names["predicted"], "store").both([0], k=1)
    # The one that lowered the prediction most was overestimated, the one that raised it most underestimated.
    (up, down), model = (hits.ids[0, 0] for hits in moved), names["task"].model
    with torch.no_grad():
        errors = model(names["x"][:400]) - names["y"][:400]
    assert errors[up] > 0 > errors[down]
    check_scores(names["task"], [0.01] * 5)


@pytest.mark.slow
def test_graphs(run):
    imported("torch_geometric")
    names, printed = run("graphs.md")
    assert SIGN in printed[1]
    hits = names["retriever"].both(range(10), k=5)
    labels = np.array([[int(graph.y)] for graph in names["test_set"]])
    assert np.mean(hits.proponents.columns["label"] == labels) > 0.9
    assert np.mean(hits.opponents.columns["label"] == labels) < 0.1
    check_scores(names["task"], [0.05] * 3)


@pytest.mark.slow
def test_a_detector(run):
    names, printed = run("detection.md")
    assert SIGN in printed[1]
    retriever = gradindex.load(replace(names["task"], query_loss=names["class_loss"]), "store")
    first = [str(int(target["labels"][0])) for _, target in names["test_set"]]
    shares = []
    for hits in retriever.both(range(10), k=5):
        pairs = zip(first, hits.columns["labels"], strict=True)
        shares.append(np.mean([[label in text for text in row] for label, row in pairs]))
    assert shares[0] > shares[1] + 0.3  # proponents show a thing of the query's class
    check_scores(names["task"], [0.1] * 6)


@pytest.mark.slow
def test_two_optimizers(run):
    names, printed = run("optimizers.md")
    assert SIGN in printed[1]
    assert re.search(r"^at checkpoint +backbone.0 +head +all layers$", printed[2], re.M)
    rates, share = [], 0.0
    for epoch in range(10):
        shares = []
        for _ in range(10):
            share = 1 + 0.9 * share
            shares.append(share)
        rates.append((0.02 * 0.9**epoch * sum(shares), 0.2 * 10))
    backbone, head = (sum(p.numel() for p in part.parameters()) for part in names["model"])
    check_scores(names["task"], [[slow] * backbone + [fast] * head for slow, fast in rates[::2]])
