"""Scores by token: equal to naive autograd of each token's loss, adding up to the score, and shown as coloured text."""

import re
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
import toys
from frameworks import imported
from torch import nn

import gradindex
from gradindex import losses
from gradindex.errors import ArgumentError, LossError, TaskError
from gradindex.gradients import GEOMETRIES, TracIn
from gradindex.gradients import tokens as token_module
from gradindex.projection import Projection

N_QUERY, IDS = 2, [5, 0, 3]


class Words:
    """A tokenizer."""

    def __call__(self, text):
        return {"input_ids": [int(word[1:]) for word in text.split()]}

    def convert_ids_to_tokens(self, ids):
        return [f"\u0120w{i}" for i in ids]


class Bag(nn.Module):
    """A language model whose output layer is its table, with a scale and a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.table, self.scale, self.inner = (
            nn.Embedding(9, 4),
            nn.Parameter(torch.ones(4)),
            nn.GRU(4, 4, batch_first=True),
        )
        self.norm = nn.LayerNorm(4)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.norm(self.inner(self.table(input_ids) * self.scale)[0]) @ self.table.weight.T}


class Plain(nn.Module):
    """A language model without anything that lacks a rule."""

    def __init__(self, cube=None):
        super().__init__()
        self.table, self.head, self.cube = nn.Embedding(9, 4), nn.Linear(4, 9), cube or torch.tanh

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.head(self.cube(self.table(input_ids)))}


def texts(n, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (n,), generator=generator).tolist()
    return [{"input_ids": torch.randint(1, 9, (length,), generator=generator).tolist()} for length in lengths]


def padded(items):
    rows = [torch.tensor(item["input_ids"]) for item in items]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def make(folder, model, loss=None, **options):
    loss = losses.causal_lm() if loss is None else loss
    options = {"train": texts(6, 0), "query": texts(4, 1), "collate": padded, "tokenizer": Words()} | options
    return toys.make_task(folder, model, loss=loss, **options)


def opened(task, folder, **options):
    gradindex.build(task, folder / "store", projection=Projection(dim=16), precision="float64", **options)
    return gradindex.load(task, folder / "store")


def of_token(loss, position):
    return lambda model, batch: loss.tokens(model, batch)[:, position]


def check(task, found, rates=toys.RATES):
    """Each share against autograd of that token's loss alone, and their sums against the scores."""
    queries, train = list(task.query)[:N_QUERY], [task.train[i] for i in IDS]
    whole = reference.gradients(task, queries, "query"), reference.gradients(task, train)
    truth, scale = reference.scores(task, *whole, rates)
    np.testing.assert_allclose(found.scores, truth, rtol=1e-6, atol=1e-10 * scale.max())
    for q, item in enumerate(queries):
        for position in range(len(item["input_ids"])):
            own = replace(task, query_loss=of_token(task.loss_for("query"), position))
            share, _ = reference.scores(task, reference.gradients(own, [item], "query"), whole[1], rates)
            np.testing.assert_allclose(found.by_query[q][:, position], share[0], rtol=1e-6, atol=1e-10 * scale.max())
    for n, item in enumerate(train):
        for position in range(len(item["input_ids"])):
            own = replace(task, loss=of_token(task.loss, position), query_loss=task.loss_for("query"))
            share, _ = reference.scores(task, whole[0], reference.gradients(own, [item]), rates)
            np.testing.assert_allclose(found.by_train[n][:, position], share[:, 0], rtol=1e-6, atol=1e-10 * scale.max())


WAYS = {
    "forward mode": lambda: Plain(),
    "a recurrent layer": lambda: Bag(),
    "double backward": lambda: Plain(toys.Twice.apply),
    "token by token": lambda: Plain(toys.Once.apply),
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_shares_equal_autograd_of_each_token_and_add_up(tmp_path, way):
    task = make(tmp_path, WAYS[way]())
    retriever = opened(task, tmp_path)
    check(task, retriever.explain_tokens(range(N_QUERY), IDS))
    explained = retriever.explain(range(N_QUERY), IDS).scores.sum((2, 3))
    np.testing.assert_allclose(retriever.explain_tokens(range(N_QUERY), IDS).scores, explained, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of transformers
def test_shares_of_a_transformer_equal_autograd(tmp_path):
    transformers = imported("transformers")
    config = transformers.GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    task = make(tmp_path, transformers.GPT2LMHeadModel(config), losses.causal_lm("sum"))
    check(task, opened(task, tmp_path).explain_tokens(range(N_QUERY), IDS))


@pytest.mark.parametrize(
    ("model", "count"), [(Plain, 3), (lambda: Plain(toys.Twice.apply), 2), (lambda: Plain(toys.Once.apply), 1)]
)
def test_one_pass_gives_the_shares_of_all_tokens_where_there_is_a_rule(tmp_path, model, count, monkeypatch):
    kept = []
    task = make(tmp_path, model())
    retriever = opened(task, tmp_path)
    split = token_module.TokenProducts.split
    monkeypatch.setattr(
        token_module.TokenProducts, "split", lambda self, *args: (split(self, *args), kept.append(self))[0]
    )
    retriever.explain_tokens(0, [1])
    assert len(kept[-1]._ways) == count


class OfQueries(TracIn):
    """Maps queries alone, and not by a symmetric matrix."""

    by_factors = False

    @staticmethod
    def _matrix(layer, like):
        generator = torch.Generator().manual_seed(layer.d_in)
        return torch.randn(layer.d_in, layer.d_in, generator=generator).to(like)

    def query(self, checkpoint, layer, gradients):
        formed = gradients.gradient
        return type(self)._formed(formed @ self._matrix(layer, formed))

    def exact(self, checkpoint, layer, gradients):
        return gradients

    @staticmethod
    def _formed(gradient):
        from gradindex.factors import Formed

        return Formed(gradient)


@pytest.fixture
def of_queries():
    """Registered under its name for the time of a test."""
    GEOMETRIES.register("of queries")(OfQueries)
    yield "of queries"
    del GEOMETRIES._implementations["of queries"]


@pytest.mark.slow
def test_shares_follow_the_geometry_of_queries(tmp_path, of_queries):
    task = make(tmp_path, Plain(), preconditioner=of_queries)
    retriever = opened(task, tmp_path)
    found = retriever.explain_tokens(range(N_QUERY), IDS)
    scores = retriever.explain(range(N_QUERY), IDS).scores.sum((2, 3))
    np.testing.assert_allclose([shares.sum(1) for shares in found.by_query], scores, rtol=1e-6)
    np.testing.assert_allclose(np.transpose([shares.sum(1) for shares in found.by_train]), scores, rtol=1e-6)


@pytest.mark.slow
def test_shares_of_cosines_add_up_to_the_cosine(tmp_path):
    retriever = opened(make(tmp_path, Plain()), tmp_path, unit_norm=True)
    found = retriever.explain_tokens(range(N_QUERY), IDS)
    np.testing.assert_allclose(found.scores, retriever.exact_scores(range(N_QUERY))[:, IDS], rtol=1e-6)
    np.testing.assert_allclose(np.transpose([s.sum(1) for s in found.by_train]), found.scores, rtol=1e-6)
    assert "cosines" in found.note


def test_one_side_is_split_where_the_other_loss_is_no_sum(tmp_path):
    loss = losses.causal_lm()
    task = make(tmp_path, Plain(), loss, query_loss=lambda model, batch: loss(model, batch).exp())
    found = opened(task, tmp_path).explain_tokens(0, [1])
    assert found.query_tokens == ((),)
    assert {record["side"] for record in found.records()} == {"train"}
    exact = gradindex.exact_scores(task, [task.query[0]], np.array([1]), precision="float64")
    np.testing.assert_allclose(found.scores, exact, rtol=1e-6)


def test_predicted_tokens_are_the_ones_that_are_shown(tmp_path):
    task = make(tmp_path, Plain(), query_loss="predicted")
    found = opened(task, tmp_path).explain_tokens(0, [1])
    model = task.model.double()
    model.load_state_dict(task.checkpoints[-1].load(model))
    ids = task.query[0]["input_ids"]
    greedy = model(torch.tensor([ids]))["logits"][0].argmax(1).tolist()
    assert found.query_tokens[0] == tuple(f"\u0120w{i}" for i in [ids[0], *greedy[:-1]])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    return opened(make(folder, Plain()), folder).explain_tokens([0, 1], [2, 4])


def test_tokens_print_as_tables_and_as_records(found):
    blocks = str(found).split("\n\n")
    assert blocks[0].splitlines()[0] == f"query 0, id 2: score {found.scores[0, 0]:.5g}"
    first = re.split(r"\s{2,}", blocks[0].splitlines()[3].strip())
    assert first == ["1", found.query_tokens[0][1], f"{found.by_query[0][0, 1]:.5g}"]
    assert blocks[-1] == found.note
    records = found.records()
    assert records[1] == {
        "query": "query 0", "id": 2, "side": "query", "position": 1, "token": found.query_tokens[0][1],
        "score": found.by_query[0][0, 1],
    }  # fmt: skip
    train = [r["score"] for r in records if (r["query"], r["id"], r["side"]) == ("query 1", 4, "train")]
    np.testing.assert_array_equal(train, found.by_train[1][1])
    assert found.to_pandas().to_dict("records") == records
    assert "\n" not in repr(found)


def test_tokens_are_coloured_by_their_shares(found, tmp_path):
    html = found._repr_html_()
    spans = re.findall(r'<span class="gi-(up|down)" style="--s: (\d+)%" title="([^"]+)">([^<]*)</span>', html)
    shares = [record["score"] for record in found.records()]
    assert len(spans) == len(shares)
    assert all((sign == "up") == (share > 0) for (sign, *_), share in zip(spans, shares, strict=True))
    own = np.abs(found.by_query[0][0])
    assert [int(strength) for _, strength, *_ in spans[: len(own)]] == [int(f"{80 * x / own.max():.0f}") for x in own]
    assert spans[1][3] == f" {found.query_tokens[0][1][1:]}"
    found.save_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count('<span class="gi-') == len(spans)
    assert "by token of training example 4" in page


def test_texts_in_pages_are_escaped(found):
    odd = replace(found, query_tokens=(("<b>",) * len(found.query_tokens[0]), found.query_tokens[1]))
    assert "&lt;b&gt;" in odd._repr_html_()
    assert "<b>" not in odd._repr_html_()


def test_what_has_no_tokens_is_refused(tmp_path):
    retriever = opened(make(tmp_path, Plain()), tmp_path)
    with pytest.raises(ArgumentError, match="A group of queries has no tokens of its own"):
        retriever.explain_tokens(retriever.prepare([0, 1], aggregate="sum"), [1])
    with pytest.raises(ArgumentError, match="There is no training id 6"):
        retriever.explain_tokens(0, [6])
    (tmp_path / "classes").mkdir()
    classes = toys.make_task(tmp_path / "classes")
    with pytest.raises(TaskError, match="cross_entropy does not tell the shares of tokens"):
        opened(classes, tmp_path / "classes").explain_tokens(0, [1])


class Wrong(losses.TokenLoss):
    """Shares that do not add up."""

    def tokens(self, model, batch):
        return super().tokens(model, batch) * 2

    def __call__(self, model, batch):
        return super().tokens(model, batch).sum(1)


def test_shares_that_do_not_add_up_are_refused(tmp_path):
    retriever = opened(make(tmp_path, Plain(), Wrong("causal_lm")), tmp_path)
    with pytest.raises(LossError, match="shares of tokens add up to"):
        retriever.explain_tokens(0, [1])


TASK = """
import gradindex
from gradindex import losses
from test_tokens import Plain, Words, padded, texts

task = gradindex.Task(
    Plain(), losses.causal_lm(), texts(6, 0), [gradindex.Checkpoint("w_0.pt", learning_rate=0.1)], collate=padded,
    tokenizer=Words(),
)
"""


def test_the_command_line_explains_by_token(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make(tmp_path, Plain())
    (tmp_path / "mine.py").write_text(TASK)
    task = gradindex.load_task("mine.py:task")
    gradindex.build(task, "store")
    options = ["explain", "store", "--task", "mine.py:task", "--text", "w3 w7 w2", "--id", 2, "--tokens"]
    own = gradindex.load(task, "store").explain_tokens([Words()("w3 w7 w2")], [2])
    assert toys.call(*options, "--html", "page.html").stdout == f"{own}\n"
    assert "gi-tokens" in (tmp_path / "page.html").read_text()
    lines = toys.call(*options, "--csv").stdout.splitlines()
    assert lines[0] == "query,id,side,position,token,score"
    assert len(lines) == 1 + len(own.records())
