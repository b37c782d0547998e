"""Queries about the model's own answer, and queries that are texts."""

import re
from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
import toys
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset, default_collate

import gradindex
from gradindex import losses
from gradindex.errors import GradIndexError, LossError, TaskError

WORDS = ["[PAD]", *(f"w{i}" for i in range(1, 30))]


def scores_of(task, items):
    """Naive float64 scores of all training examples for queries as they are."""
    return reference.scores(task, reference.gradients(task, items), reference.gradients(task, task.train), toys.RATES)


def at_last_checkpoint(task):
    model = task.model.double()
    model.load_state_dict(task.checkpoints[-1].load(model))
    return model.eval()


def check(task, relabelled):
    """Scores of ``predicted`` equal those of naive autograd with labels that were put in by hand."""
    truth, scale = scores_of(task, relabelled)
    asked = replace(task, query_loss="predicted")
    found = gradindex.exact_scores(asked, [task.query[i] for i in range(len(task.query))], precision="float64")
    assert np.all(np.abs(found - truth) <= 1e-6 * np.abs(truth).max() + 1e-10 * scale)
    given = gradindex.exact_scores(task, [task.query[i] for i in range(len(task.query))], precision="float64")
    assert not np.allclose(found, given)  # the labels that were given are others


@pytest.mark.parametrize("loss", [losses.cross_entropy(), losses.binary_cross_entropy()], ids=["classes", "yes or no"])
def test_a_class_is_explained_as_the_final_model_names_it(tmp_path, loss):
    task = toys.make_task(tmp_path, loss=loss)
    model = at_last_checkpoint(task)
    x = task.query.tensors[0]
    check(task, TensorDataset(x, model(x).argmax(1)))


def test_shares_of_classes_give_way_to_the_answer(tmp_path):
    data = [TensorDataset(torch.randn(n, 6).double(), torch.rand(n, 3).softmax(1).double()) for n in (6, 3)]
    task = toys.make_task(tmp_path, loss=losses.cross_entropy(0.1), train=data[0], query=data[1])
    x = task.query.tensors[0]
    answers = at_last_checkpoint(task)(x).argmax(1)
    truth, scale = reference.scores(
        task,
        reference.gradients(task, list(TensorDataset(x, answers))),
        reference.gradients(task, task.train),
        toys.RATES,
    )
    found = gradindex.exact_scores(replace(task, query_loss="predicted"), list(task.query), precision="float64")
    assert np.all(np.abs(found - truth) <= 1e-10 * scale)


class Named:
    """A loss of the user's own that can answer."""

    def __call__(self, model, batch):
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def predictions(self, model, batch):
        self.calls = getattr(self, "calls", 0) + len(batch[0])
        return model(batch[0]).argmax(1)

    def relabelled(self, batch, predictions):
        return batch[0], torch.stack(predictions)


def test_a_loss_of_ones_own_can_answer_and_is_asked_once_for_each_query(tmp_path):
    loss = Named()
    task = toys.make_task(tmp_path, loss=loss)
    x = task.query.tensors[0]
    check(task, TensorDataset(x, at_last_checkpoint(task)(x).argmax(1)))
    gradindex.build(replace(task, query_loss="predicted"), tmp_path / "store")
    retriever = gradindex.load(replace(task, query_loss="predicted"), tmp_path / "store")
    loss.calls = 0
    queries = retriever.prepare([0, 1])
    retriever.both(queries, k=3)
    retriever.explain(queries, [3])
    retriever.both([1], k=3)
    assert loss.calls == 2


def test_stores_answer_about_predictions_whatever_labels_queries_have(tmp_path):
    task = toys.make_task(tmp_path, loss=losses.cross_entropy(), query_loss="predicted")
    gradindex.build(task, tmp_path / "store", precision="float64")
    x, y = task.query.tensors
    retriever = gradindex.load(task, tmp_path / "store")
    some, others = (retriever.exact_scores([(x[0], label)]) for label in (y[0], (y[0] + 1) % 3))
    np.testing.assert_array_equal(some, others)
    answered = at_last_checkpoint(task)(x[:1]).argmax(1)
    truth, scale = scores_of(task, [(x[0], answered[0])])
    assert np.all(np.abs(some - truth) <= 1e-10 * scale)


def text_items(n, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 8, (n,), generator=generator).tolist()
    return [{"input_ids": torch.randint(1, 30, (length,), generator=generator).tolist()} for length in lengths]


def padded(items):
    longest = max(len(item["input_ids"]) for item in items)
    rows = [item["input_ids"] + [0] * (longest - len(item["input_ids"])) for item in items]
    ids = torch.tensor(rows)
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    if "labels" in items[0]:
        labels = [item["labels"] + [-100] * (longest - len(item["labels"])) for item in items]
        batch["labels"] = torch.tensor(labels)
    return batch


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of transformers
def test_a_language_models_greedy_tokens_are_explained(tmp_path, gpt2):
    task = toys.make_task(
        tmp_path, gpt2(), loss=losses.causal_lm(), collate=padded, train=text_items(5, 0),
        query=text_items(3, 1),
    )  # fmt: skip
    model, relabelled = at_last_checkpoint(task), []
    for item in task.query:
        greedy = model(input_ids=torch.tensor([item["input_ids"]])).logits[0].argmax(1).tolist()
        relabelled.append(item | {"labels": [-100, *greedy[:-1]]})
    check(task, relabelled)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of transformers
def test_classes_of_tokens_are_explained_without_labels(tmp_path, bert):
    train = [item | {"labels": [i % 3 for i in item["input_ids"]]} for item in text_items(5, 0)]
    task = toys.make_task(
        tmp_path, bert("BertForTokenClassification", num_labels=3), loss=losses.token_classification(), collate=padded,
        train=train, query=text_items(2, 1), query_loss="predicted",
    )  # fmt: skip
    model = at_last_checkpoint(task)
    relabelled = [
        item | {"labels": model(input_ids=torch.tensor([item["input_ids"]])).logits[0].argmax(1).tolist()}
        for item in task.query
    ]
    truth, scale = scores_of(task, relabelled)
    found = gradindex.exact_scores(task, list(task.query), precision="float64")
    assert np.all(np.abs(found - truth) <= 1e-10 * scale)


def test_what_cannot_answer_is_refused(tmp_path):
    task = toys.make_task(tmp_path)
    for loss, asked, message in (
        (toys.cross_entropy, "predicted", "but cross_entropy has not. Use one of gradindex.losses"),
        (losses.detection(), "predicted", "needs a loss with predictions"),
        (losses.cross_entropy(), "greedy", "query_loss is 'greedy', but must be a function or 'predicted'"),
    ):
        with pytest.raises(TaskError, match=message):
            replace(task, loss=loss, query_loss=asked)
    (tmp_path / "numbers").mkdir()
    loss = losses.sequence_classification()
    numbers = toys.make_task(tmp_path / "numbers", toys.regressor(), loss=loss, query_loss="predicted")
    with pytest.raises(GradIndexError, match="squared error of a model's own answer is 0"):
        gradindex.exact_scores(numbers, [task.query[0]])
    loss = Named()
    loss.predictions = lambda model, batch: [1, 2]
    with pytest.raises(LossError, match="has 2 predictions for one example"):
        gradindex.exact_scores(replace(task, loss=loss, query_loss="predicted"), [task.query[0]])


def numbers_of(text):
    return {"input_ids": [WORDS.index(word) for word in text.split()]}


class Bag(nn.Module):
    """A language model that looks at the token before alone."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(30, 4), nn.Linear(4, 30)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.head(torch.tanh(self.table(input_ids)))}


TASK = """
import torch
import gradindex
from gradindex import losses
from test_predicted import Bag, numbers_of, padded, text_items

model = Bag()
task = gradindex.Task(
    model, losses.causal_lm(), text_items(12, 0), [gradindex.Checkpoint("w_0.pt", learning_rate=0.1)],
    collate=padded, tokenizer=numbers_of,
)
untold = gradindex.Task(model, task.loss, task.train, task.checkpoints, collate=padded)
"""


def test_texts_are_queries_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    task = toys.make_task(tmp_path, Bag(), loss=losses.causal_lm(), collate=padded, train=text_items(12, 0))
    (tmp_path / "mine.py").write_text(TASK)
    (tmp_path / "w_0.pt").write_bytes((tmp_path / "w_2.pt").read_bytes())
    task = gradindex.load_task("mine.py:task")
    gradindex.build(task, "store")
    options = ["query", "store", "--task", "mine.py:task", "--text", "w3 w7 w9", "--text", "w4 w4", "-k", 2]
    printed = toys.call(*options, "--json").stdout
    hits = gradindex.load(task, "store").both([numbers_of("w3 w7 w9"), numbers_of("w4 w4")], k=2)
    assert [int(i) for i in re.findall(r'"id": (\d+)', printed)] == np.concatenate(
        [hits.proponents.ids.ravel(), hits.opponents.ids.ravel()]
    ).tolist()
    for arguments, code, message in (
        (["--task", "mine.py:task", "--text", "hello"], 1, "Tokenizing 'hello' failed: ValueError: 'hello' is not"),
        (["--task", "mine.py:untold", "--text", "w3"], 1, "The task has no tokenizer, so it cannot read texts."),
        (["--task", "mine.py:task", "--text", "w3", "-q", 0], 2, "exactly one of --position, --train-id, --file and"),
    ):  # fmt: skip
        result = toys.call("query", "store", *arguments)
        assert result.exit_code == code
        assert message in result.stderr and "Traceback" not in result.stderr


def test_a_tokenizer_must_be_a_function(tmp_path):
    with pytest.raises(TaskError, match="tokenizer is a str, but must be a function"):
        toys.make_task(tmp_path, tokenizer="gpt2")
    assert toys.make_task(tmp_path, collate=default_collate).token_names([3, 4]) == ["3", "4"]
