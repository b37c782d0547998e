"""Losses for tasks: what the libraries' own models and losses give for one example, and naive autograd's scores."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
import toys
from frameworks import imported
from torch import nn
from torch.nn import functional

import gradindex
from gradindex import losses
from gradindex.errors import ArgumentError, LossError, TaskError

LABELS = [-100, 4, 7, -100, 2, 9]


def texts(n, seed=0, longest=7, mask=False):
    """Texts of different lengths, with their labels."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in torch.randint(3, longest, (n,), generator=generator).tolist():
        ids = torch.randint(1, 30, (length,), generator=generator)
        labels = ids.clone()
        labels[0 if mask else 1] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def padded(items):
    """A batch as a collate function of transformers makes it."""

    def pad(key, value):
        return nn.utils.rnn.pad_sequence([item[key] for item in items], batch_first=True, padding_value=value)

    batch = {"input_ids": pad("input_ids", 0), "attention_mask": (pad("input_ids", 0) != 0).long()}
    labels = items[0]["labels"]
    return batch | {"labels": pad("labels", -100) if labels.ndim else torch.stack([item["labels"] for item in items])}


def of_each_alone(model, items):
    with torch.no_grad():
        return torch.stack([model(**padded([item])).loss for item in items])


def check(model, loss, items):
    """Losses in a batch are the model's own, and scores are those of naive autograd."""
    with torch.no_grad():
        torch.testing.assert_close(loss(model, padded(items)), of_each_alone(model, items), rtol=1e-5, atol=1e-6)


def check_scores(folder, model, loss, train, query, collate):
    task = toys.make_task(folder, model, loss=loss, train=train, query=query, collate=collate)
    reference.check_against_autograd(task)
    return task


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_causal_language_models_loss_is_its_own(gpt2, reduction):
    model, items = gpt2(), texts(4)
    with torch.no_grad():
        found = losses.causal_lm(reduction)(model, padded(items))
    own = of_each_alone(model, items)
    if reduction == "sum":
        own = own * torch.tensor([int((item["labels"][1:] != -100).sum()) for item in items])
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)


def test_without_labels_the_tokens_are_the_labels(gpt2):
    model, batch = gpt2(), padded(texts(3))
    del batch["labels"]
    with torch.no_grad():
        for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"], strict=True)):
            ids = ids[mask.bool()][None]
            own = model(input_ids=ids, labels=ids).loss
            torch.testing.assert_close(losses.causal_lm()(model, batch)[row], own, rtol=1e-5, atol=1e-6)


def test_completion_only_counts_what_the_mask_marks(gpt2):
    model, batch = gpt2(), padded(texts(2))
    mask = torch.zeros_like(batch["input_ids"])
    mask[:, 2] = 1
    loss = losses.causal_lm(completion_only=True)
    with torch.no_grad():
        shares = loss.tokens(model, {**batch, "completion_mask": mask})
    assert (shares != 0).nonzero().tolist() == [[0, 2], [1, 2]]
    with pytest.raises(LossError, match="needs a completion_mask"):
        loss(model, batch)


def test_shares_of_tokens_stand_at_their_own_positions_and_add_up(gpt2):
    model, items = gpt2(), texts(1, longest=6)
    batch = padded(items)
    loss = losses.causal_lm()
    with torch.no_grad():
        shares = loss.tokens(model, batch)
        likelihoods = model(batch["input_ids"]).logits.log_softmax(2)
    ids = batch["input_ids"][0]
    length = len(ids)
    expected = torch.tensor([0, 0, *[-likelihoods[0, p - 1, ids[p]] / (length - 2) for p in range(2, length)]])
    torch.testing.assert_close(shares[0], expected)
    torch.testing.assert_close(shares.sum(1), loss(model, batch))
    assert loss.token_ids(batch).tolist() == batch["input_ids"].tolist()


def test_a_text_without_labels_has_no_mean(gpt2):
    batch = {"input_ids": torch.tensor([[1, 2]]), "labels": torch.full((1, 2), -100)}
    assert losses.causal_lm()(gpt2(), batch).isnan().all()
    assert losses.causal_lm("sum")(gpt2(), batch).tolist() == [0]


@pytest.mark.parametrize(
    ("head", "loss", "options"),
    [
        ("BertForMaskedLM", losses.masked_lm(), {}),
        ("BertForTokenClassification", losses.token_classification(), {"num_labels": 30}),
    ],
)
def test_losses_of_every_token_are_the_models_own(bert, head, loss, options):
    check(bert(head, **options), loss, texts(4, mask=True))


CLASSES = {
    "one of three classes": ({"num_labels": 3}, lambda i: torch.tensor(i % 3)),
    "several labels": ({"num_labels": 3}, lambda i: torch.tensor([i % 2, 1, 0]).float()),
    "a number": ({"num_labels": 1}, lambda i: torch.tensor(0.5 * i)),
    "configured numbers": (
        {"num_labels": 2, "problem_type": "regression"}, lambda i: torch.tensor([0.5 * i, 1]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CLASSES)
def test_sequence_classification_is_the_models_own(bert, case):
    options, label = CLASSES[case]
    items = [item | {"labels": label(i)} for i, item in enumerate(texts(4))]
    model, other = (bert("BertForSequenceClassification", **options) for _ in range(2))
    with torch.no_grad():
        found = losses.sequence_classification()(model, padded(items))  # before the model writes its problem type
    torch.testing.assert_close(found, of_each_alone(other, items), rtol=1e-5, atol=1e-6)


def choices(n):
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(1, 30, (3, 5), generator=generator), "labels": torch.tensor(i % 3)}
        for i in range(n)
    ]


def test_multiple_choice_is_the_models_own(bert):
    model, items = bert("BertForMultipleChoice"), choices(4)
    batch = torch.utils.data.default_collate(items)
    with torch.no_grad():
        own = [model(**torch.utils.data.default_collate([item])).loss for item in items]
        torch.testing.assert_close(losses.multiple_choice()(model, batch), torch.stack(own), rtol=1e-5, atol=1e-6)


def soft(n):
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(1)).softmax(1)


def test_losses_of_pictures_are_timms_for_one():
    timm = imported("timm.loss")
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3), torch.randn(5, 6), torch.tensor([0, 2, 1, 1, 0])
    for ours, theirs, target in (
        (losses.cross_entropy(0.1), timm.LabelSmoothingCrossEntropy(0.1), y),
        (losses.cross_entropy(), timm.SoftTargetCrossEntropy(), soft(5)),
        (losses.binary_cross_entropy(), timm.BinaryCrossEntropy(), y),
        (losses.binary_cross_entropy(0.2, 0.3, True, 2.0),
         timm.BinaryCrossEntropy(0.2, 0.3, None, "mean", True, 2.0), soft(5)),
        (losses.binary_cross_entropy(smooth_dense=True), timm.BinaryCrossEntropy(smooth_dense=True), soft(5).round()),
    ):  # fmt: skip
        own = torch.stack([theirs(model(x[i : i + 1]), target[i : i + 1]) for i in range(5)])
        torch.testing.assert_close(ours(model, (x, target)), own)


def preferences(n, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def some(length):
        return torch.randint(1, 30, (length,), generator=generator).tolist()

    return [{"prompt_ids": some(2), "chosen_ids": some(2 + i % 2), "rejected_ids": some(3)} for i in range(n)]


def in_pairs(items):
    """As TRL's DataCollatorForPreference, which needs accelerate and datasets."""
    rows = [(item["prompt_ids"], item[f"{side}_ids"]) for side in ("chosen", "rejected") for item in items]

    def pad(lists):
        return nn.utils.rnn.pad_sequence([torch.tensor(values) for values in lists], batch_first=True)

    return {
        "input_ids": pad([a + b for a, b in rows]),
        "attention_mask": pad([[1] * len(a + b) for a, b in rows]),
        "completion_mask": pad([[0] * len(a) + [1] * len(b) for a, b in rows]),
    }


def dpo_by_hand(model, before, item, beta=0.1, smoothing=0.0):
    def likelihood(of, side):
        ids = torch.tensor([item["prompt_ids"] + item[f"{side}_ids"]])
        shares, start = of(input_ids=ids).logits.log_softmax(2), len(item["prompt_ids"])
        return sum(shares[0, p - 1, ids[0, p]] for p in range(start, ids.shape[1]))

    ratios = [likelihood(model, side) - likelihood(before, side).detach() for side in ("chosen", "rejected")]
    margin = beta * (ratios[0] - ratios[1])
    return -(1 - smoothing) * functional.logsigmoid(margin) - smoothing * functional.logsigmoid(-margin)


def test_dpo_is_its_formula_whatever_gives_the_reference(gpt2):
    model, before, items = gpt2(0), gpt2(1), preferences(3)
    own = torch.stack([dpo_by_hand(model, before, item, 0.5, 0.1) for item in items])
    batch = in_pairs(items)
    torch.testing.assert_close(losses.dpo(before, 0.5, 0.1)(model, batch), own, rtol=1e-5, atol=1e-6)
    labelled = {}
    for side, half in (("chosen", slice(0, 3)), ("rejected", slice(3, 6))):
        ids, mask = batch["input_ids"][half], batch["completion_mask"][half]
        labelled |= {f"{side}_input_ids": ids, f"{side}_labels": ids.where(mask.bool(), -100)}
        with torch.no_grad():
            shares = losses.causal_lm("sum")(before, {"input_ids": ids, "labels": labelled[f"{side}_labels"]})
        labelled[f"ref_{side}_logps"] = -shares
    torch.testing.assert_close(losses.dpo(None, 0.5, 0.1)(model, labelled), own, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("default")  # of peft
def test_dpo_takes_adapters_off_for_its_reference(gpt2):
    peft = imported("peft")
    before = gpt2(0)
    model = peft.get_peft_model(gpt2(0), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    items = preferences(2)
    own = torch.stack([dpo_by_hand(model, before, item) for item in items])
    torch.testing.assert_close(losses.dpo()(model, in_pairs(items)), own, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_trls_batches_of_preferences_are_taken(gpt2):
    trainer = imported("trl.trainer.dpo_trainer")
    items = preferences(3)
    batch = trainer.DataCollatorForPreference(pad_token_id=0)(items)
    assert {key: value.tolist() for key, value in in_pairs(items).items()} == {k: v.tolist() for k, v in batch.items()}


def test_dpo_without_a_reference_says_what_to_give(gpt2):
    model = gpt2()
    for reference_, message in ((None, "dpo has no reference"), (model, "is the trained model itself")):
        with pytest.raises(TaskError, match=message):
            losses.dpo(reference_)(model, in_pairs(preferences(1)))
    with pytest.raises(LossError, match="needs input_ids and completion_mask"):
        losses.dpo(gpt2(1))(model, {"input_ids": torch.ones(2, 3, dtype=torch.long)})


def test_contrastive_losses_are_refused_with_the_reason():
    with pytest.raises(TaskError, match="compares each example with the others of its batch"):
        losses.contrastive(temperature=0.07)


CASES = {
    "causal": lambda gpt2, bert: (gpt2(), losses.causal_lm(), texts(5), texts(2, 1), padded),
    "masked": lambda gpt2, bert: (
        bert("BertForMaskedLM"), losses.masked_lm("sum"), texts(5, mask=True), texts(2, 1, mask=True), padded,
    ),
    "tokens": lambda gpt2, bert: (
        bert("BertForTokenClassification", num_labels=30), losses.token_classification(), texts(5), texts(2, 1), padded,
    ),
    "sequences": lambda gpt2, bert: (
        bert("BertForSequenceClassification", num_labels=3), losses.sequence_classification(),
        *([item | {"labels": torch.tensor(i % 3)} for i, item in enumerate(texts(n, n))] for n in (5, 2)), padded,
    ),
    "choices": lambda gpt2, bert: (
        bert("BertForMultipleChoice"), losses.multiple_choice(), choices(4), choices(2),
        torch.utils.data.default_collate,
    ),
    "preferences": lambda gpt2, bert: (
        gpt2(), losses.dpo(gpt2(1)), preferences(5), preferences(2, 1), in_pairs,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of transformers
@pytest.mark.parametrize("case", CASES)
def test_scores_equal_naive_autograd(tmp_path, gpt2, bert, case):
    check_scores(tmp_path, *CASES[case](gpt2, bert))


@pytest.mark.parametrize(
    "loss", [losses.cross_entropy(0.1), losses.binary_cross_entropy(), losses.cross_entropy()], ids=repr
)
def test_scores_of_pictures_equal_naive_autograd(tmp_path, loss):
    task = check_scores(
        tmp_path, None, loss, *(torch.utils.data.TensorDataset(torch.randn(n, 6).double(), soft(n)) for n in (6, 2)),
        torch.utils.data.default_collate,
    )  # fmt: skip
    store = gradindex.build(task, tmp_path / "store")
    assert store.manifest.map.loss == repr(loss)


class Small(nn.Module):
    """What a detector looks at."""

    out_channels = 4

    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Conv2d(3, 4, 8, 8), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.inner(x))


def detector():
    parts = imported("torchvision.models.detection")
    torch.manual_seed(0)
    anchors = parts.anchor_utils.AnchorGenerator(sizes=((8, 16),), aspect_ratios=((1.0,),))
    return parts.RetinaNet(Small(), 3, min_size=32, max_size=32, anchor_generator=anchors).eval()


class Drawing(nn.Module):
    """Draws proposals while it trains, as Faster R-CNN does, whose operators need a matching build of torchvision."""

    def __init__(self):
        super().__init__()
        self.inner, self.drop = nn.Conv2d(3, 4, 8, 8), nn.Dropout(0.5)

    def forward(self, pictures, targets=None):
        if not self.training:
            return [{"boxes": torch.zeros(0, 4)}]
        found = self.drop(self.inner(torch.stack(pictures))).flatten()
        chosen = torch.randperm(len(found), device=found.device)[:5]
        return {
            "loss_objectness": found[chosen].square().mean(),
            "loss_box_reg": found.sum() * targets[0]["boxes"].mean(),
        }


def pictures(n):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.rand(3, 32, 32, generator=generator),
            {"boxes": torch.tensor([[2.0, 3, 12 + i, 14], [5, 5, 30, 28]]), "labels": torch.tensor([1, 2])},
        )
        for i in range(n)
    ]


def side_by_side(items):
    return tuple(zip(*items, strict=True))


@pytest.mark.slow
def test_detection_losses_are_the_models_own_for_one_picture():
    model, items = detector(), pictures(3)
    loss = losses.detection({"bbox_regression": 2.0})
    found = loss(model, side_by_side(items))
    assert not any(module.training for module in model.modules())
    assert torch.equal(model.backbone.norm.running_mean, torch.zeros(4))
    model.train()
    model.backbone.norm.eval()
    own = [model([picture], [target]) for picture, target in items]
    own = torch.stack([parts["classification"] + 2 * parts["bbox_regression"] for parts in own])
    torch.testing.assert_close(found, own)
    with pytest.raises(LossError, match="a mapping with mask is needed"):
        losses.detection({"mask": 1.0})(model.eval(), side_by_side(items))


@pytest.mark.slow
def test_scores_of_a_detector_equal_naive_autograd(tmp_path):
    check_scores(tmp_path, detector(), losses.detection(), pictures(4), pictures(2), side_by_side)


def test_proposals_that_are_drawn_stay_the_same(tmp_path):
    state = torch.get_rng_state()
    check_scores(tmp_path, Drawing(), losses.detection({"loss_box_reg": 0.5}), pictures(4), pictures(2), side_by_side)
    model, batch = Drawing().eval(), side_by_side(pictures(2))
    losses_ = [losses.detection(seed=seed)(model, batch) for seed in (0, 0, 1)]
    assert torch.equal(losses_[0], losses_[1])
    assert not torch.equal(losses_[0], losses_[2])
    torch.set_rng_state(state)


MADE = [
    losses.causal_lm("sum"), losses.masked_lm(), losses.token_classification(), losses.sequence_classification(),
    losses.multiple_choice(), losses.cross_entropy(0.1), losses.binary_cross_entropy(), losses.detection({"a": 2.0}),
    losses.dpo(nn.Linear(2, 2), 0.3),
]  # fmt: skip


@pytest.mark.parametrize("loss", MADE, ids=repr)
def test_losses_pickle_and_have_names_without_addresses(loss):
    again = pickle.loads(pickle.dumps(loss))
    assert repr(again) == repr(loss) == losses.name_of(loss)
    assert "0x" not in repr(loss) and "Linear" not in repr(loss)
    assert losses.name_of(toys.cross_entropy) == "cross_entropy"


def test_what_losses_cannot_be_made_of_is_refused():
    for make, message in (
        (lambda: losses.causal_lm("none"), "reduction is 'none', but must be one of: mean, sum"),
        (lambda: losses.sequence_classification("ranking"), "problem_type is 'ranking'"),
        (lambda: losses.cross_entropy(1.0), "label_smoothing is 1.0, but must be a number from 0 to below 1"),
        (lambda: losses.dpo(3), "reference is a int, but must be a model or None"),
        (lambda: losses.dpo(beta=0), "beta is 0, but must be a number above 0"),
    ):
        with pytest.raises((ArgumentError, TaskError), match=message):
            make()


def test_batches_that_a_loss_cannot_read_are_refused(gpt2):
    model, x, ids = nn.Linear(6, 3), torch.zeros(2, 6), torch.ones(2, 3, dtype=torch.long)
    for loss, of, batch, message in (
        (losses.cross_entropy(), model, x, "must be a mapping with labels or a pair"),
        (losses.cross_entropy(), model, (x, [0, 1]), "The labels are a list, but must be a tensor"),
        (losses.masked_lm(), model, {"input_ids": x}, r"no labels among its keys \(input_ids\)"),
        (losses.causal_lm(), gpt2(), (ids, ids[:, 1:]), "Pad labels as far as input_ids"),
        (losses.causal_lm(), gpt2(), (ids, torch.ones(2)), "must be integers, one for each"),
        (losses.cross_entropy(), lambda x: x[:, :, None], (x, torch.zeros(2)), r"must have \(examples, classes\)"),
        (losses.cross_entropy(), lambda x: SimpleNamespace(loss=x), (x, torch.zeros(2)), "returned no logits"),
    ):
        with pytest.raises(LossError, match=message):
            loss(of, batch)


class Tokenizer:
    """What masking needs of one."""

    mask_token_id, all_special_ids = 3, [0, 1, 2, 3]

    def __len__(self):
        return 30


def test_masks_are_the_same_at_every_read_and_as_often_as_asked():
    data = [{"input_ids": [1, *np.random.default_rng(i).integers(4, 30, 60).tolist(), 2]} for i in range(200)]
    masked = losses.Masked(data, Tokenizer(), probability=0.2, seed=6)
    items = [masked[i] for i in range(len(masked))]
    assert items == [pickle.loads(pickle.dumps(masked))[i] for i in range(200)]
    ids, labels = (np.array([item[key] for item in items]) for key in ("input_ids", "labels"))
    plain = np.array([item["input_ids"] for item in data])
    chosen = labels != -100
    np.testing.assert_array_equal(labels[chosen], plain[chosen])
    np.testing.assert_array_equal(ids[~chosen], plain[~chosen])
    assert not chosen[:, [0, -1]].any()  # special tokens
    assert abs(chosen[:, 1:-1].mean() - 0.2) < 0.01
    assert abs((ids[chosen] == 3).mean() - 0.8) < 0.03
    assert abs((ids[chosen] == plain[chosen]).mean() - 0.1) < 0.03
    assert losses.Masked(data, Tokenizer(), 0.2, seed=5)[0] != items[0]
    # The numbers themselves are part of what a store's rows mean.
    assert np.flatnonzero(chosen[0]).tolist() == [2, 4, 5, 7, 21, 27, 36, 46, 47, 58, 60]


def test_masks_keep_tensors_and_choose_at_least_one_token():
    item = {"input_ids": torch.tensor([5, 6, 7]), "special_tokens_mask": [1, 0, 1]}
    masked = losses.Masked([item] * 2, Tokenizer(), 1e-9)
    item = masked[-1]
    assert item["labels"].tolist() == [-100, 6, -100]
    assert set(item) == {"input_ids", "labels"}
    with pytest.raises(TaskError, match="Text 0 has no token that could be masked"):
        losses.Masked([{"input_ids": [0, 1]}], Tokenizer())[0]
    with pytest.raises(TaskError, match="has no mask token"):
        losses.Masked([], SimpleNamespace(mask_token_id=None))
    with pytest.raises(TaskError, match="probability is 0"):
        losses.Masked([], Tokenizer(), 0)


def test_packed_sequences_become_documents():
    packed = [
        {"input_ids": [5, 6, 7, 8, 9, 0], "position_ids": [0, 1, 0, 1, 2, 0], "attention_mask": [1, 1, 1, 1, 1, 0],
         "labels": [5, 6, -100, 8, 9, -100]},
        {"input_ids": [4, 5], "position_ids": [0, 1], "attention_mask": [1, 1], "labels": [4, 5]},
    ]  # fmt: skip
    documents = losses.Documents(packed)
    assert [documents[i]["input_ids"] for i in range(len(documents))] == [[5, 6], [7, 8, 9], [4, 5]]
    assert documents[1] == {"input_ids": [7, 8, 9], "attention_mask": [1, 1, 1], "labels": [-100, 8, 9]}
    assert (documents.sequences.tolist(), documents.starts.tolist(), documents.stops.tolist()) == (
        [0, 0, 1], [0, 2, 0], [2, 5, 2],
    )  # fmt: skip
    ended = losses.Documents([{"input_ids": torch.tensor([5, 2, 6, 7, 2, 8])}], eos_token_id=2)
    assert [ended[i]["input_ids"].tolist() for i in range(len(ended))] == [[5, 2], [6, 7, 2], [8]]
    told = losses.Documents([{"input_ids": [5, 6, 7], "seq_lengths": [1, 2]}])
    assert [told[i] for i in range(len(told))] == [{"input_ids": [5]}, {"input_ids": [6, 7]}]
    with pytest.raises(TaskError, match="nothing says where a document ends"):
        losses.Documents([{"input_ids": [5, 6]}])


def test_the_loss_of_a_packed_sequence_is_that_of_its_documents(gpt2):
    model = gpt2()
    ids = torch.tensor([5, 6, 7, 8, 9])
    packed = {"input_ids": ids, "position_ids": torch.tensor([0, 1, 0, 1, 2])}
    documents = losses.Documents([packed])
    labels = torch.tensor([[-100, 6, -100, 8, 9]])
    apart = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).tril()
    mask = torch.where(apart.bool(), 0.0, torch.finfo(torch.float32).min)[None, None]
    together = packed | {"input_ids": ids[None], "attention_mask": mask, "labels": labels}
    together["position_ids"] = packed["position_ids"][None]
    with torch.no_grad():
        whole = model(**together).loss * 3
        parts = [losses.causal_lm("sum")(model, {"input_ids": documents[i]["input_ids"][None]}) for i in range(2)]
    torch.testing.assert_close(torch.cat(parts).sum(), whole)
