"""hf.task: from a trainer to a task, against the model's own loss and naive autograd."""

import warnings
from dataclasses import replace

import frameworks
import numpy as np
import pytest
import torch
from reference import check_against_autograd

import gradindex
from gradindex.errors import TaskError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(autouse=True, scope="module")
def loaded():
    """Imported where it is used: collecting tests takes no trainer."""
    global transformers, datasets, hf
    transformers = frameworks.imported("transformers")
    datasets = frameworks.imported("datasets")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gradindex.integrations import hf


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "plot", "cast", "dull", "fine"]
TEXTS = [
    "good film",
    "bad plot",
    "fine cast",
    "dull film film",
    "good good plot",
    "bad cast",
    "fine",
    "dull bad plot",
] * 2
LABELS = [1, 0, 1, 0, 1, 0, 1, 0] * 2
SIZES = {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(WORDS))
    return transformers.BertTokenizer(str(path))


def trained(model, tokenizer, data, folder, collator=None, **options):
    torch.manual_seed(0)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "run"), per_device_train_batch_size=4, num_train_epochs=1, learning_rate=0.05,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data.select(range(3)), processing_class=tokenizer,
        data_collator=collator, callbacks=[hf.RecorderCallback(folder / "recorded", every=2)],
    )  # fmt: skip
    trainer.train()
    return trainer


def rates(task):
    """Of each checkpoint, the one of all its parameters."""
    names = [name for name, _ in task.model.named_parameters()]
    found = [set(checkpoint.learning_rates(names).values()) for checkpoint in task.checkpoints]
    return [rate for (rate,) in found]


def texts(tokenizer, **columns):
    data = datasets.Dataset.from_dict({"text": TEXTS, "source": ["here"] * 16, **columns})
    return data.map(lambda row: tokenizer(row["text"]))


@pytest.fixture
def classifier(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZES, num_labels=2, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}
    )
    model = transformers.BertForSequenceClassification(config)
    return trained(model, tokenizer, texts(tokenizer, label=LABELS), tmp_path)


def test_a_classifier_in_one_line(classifier, tmp_path):
    task = hf.task(classifier, tmp_path / "recorded")
    assert (task.n_train, task.n_query, len(task.checkpoints)) == (16, 3, 2)
    assert task.columns["label"] == ["good", "bad"] * 8 == [("bad", "good")[label] for label in LABELS]
    assert task.show(task.train[3]) == "dull film film"
    batch = task.collate([task.train[0], task.train[3]])
    assert "source" not in batch and "text" not in batch
    with torch.no_grad():
        own = [task.model.eval()(**task.collate([task.train[i]])).loss for i in (0, 3)]
        np.testing.assert_allclose(task.loss(task.model, batch), torch.stack(own), rtol=1e-5)
    check_against_autograd(task, rates(task))
    store = gradindex.build(task, tmp_path / "store")
    hits = gradindex.load(task, store.folder).proponents([0], k=3)
    assert "good film" in str(hits)
    assert "label" in store.columns
    # A text without a label is a query about the model's own answer.
    (text,) = task.read_texts(["good film"])
    assert task.token_names(text["input_ids"])[1:3] == ["good", "film"]
    asked = gradindex.load(replace(task, query_loss="predicted"), store.folder)
    found = asked.exact_scores(text)
    answer = int(task.model(**task.collate([text])).logits.argmax(1))
    np.testing.assert_allclose(found, gradindex.exact_scores(task, [text | {"label": answer}]), rtol=1e-4, atol=1e-7)


def test_masks_of_a_masked_language_model_stay_the_same(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.4)
    trainer = trained(model, tokenizer, texts(tokenizer), tmp_path, collator)
    task = hf.task(trainer, tmp_path / "recorded")
    assert task.train[2]["labels"] == task.train[2]["labels"]
    gradindex.build(task, tmp_path / "store")  # which refuses losses that differ between two calls


def test_a_causal_language_model(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = trained(model, tokenizer, texts(tokenizer), tmp_path, collator)
    task = hf.task(trainer, tmp_path / "recorded", layers="transformer.h.*")
    batch = task.collate([task.train[0]])
    with torch.no_grad():
        np.testing.assert_allclose(task.loss(task.model.eval(), batch), task.model(**batch).loss[None], rtol=1e-5)
    check_against_autograd(task, rates(task), prefixes=("transformer.h.",))


def test_what_cannot_be_told_is_asked_for(classifier, tmp_path, monkeypatch):
    recorded = tmp_path / "recorded"
    with pytest.raises(
        TaskError, match=r"loss of its own \(compute_loss_func\)\. Give it one example at a time, as loss="
    ):
        classifier.compute_loss_func = lambda *_: None
        hf.task(classifier, recorded)
    assert hf.task(classifier, recorded, loss=lambda model, batch: None).loss is not None
    classifier.compute_loss_func = None
    monkeypatch.setattr(classifier.args, "label_smoothing_factor", 0.1)
    with pytest.raises(TaskError, match="label_smoothing_factor"):
        hf.task(classifier, recorded)
    monkeypatch.setattr(classifier.args, "label_smoothing_factor", 0.0)
    monkeypatch.setattr(classifier, "eval_dataset", {"one": [], "two": []})
    with pytest.raises(TaskError, match=r"several eval_dataset: one, two\. Give one of them as query="):
        hf.task(classifier, recorded)
    monkeypatch.setattr(classifier, "eval_dataset", None)
    assert hf.task(classifier, recorded).query is None
    monkeypatch.setattr(classifier, "train_dataset", iter([]))
    with pytest.raises(TaskError, match="examples are needed that can be read by position"):
        hf.task(classifier, recorded)
    monkeypatch.undo()
    classifier.model = torch.nn.Linear(2, 2)
    with pytest.raises(TaskError, match="The model is a Linear, whose loss gradindex does not know"):
        hf.task(classifier, recorded)
