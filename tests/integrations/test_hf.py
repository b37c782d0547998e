"""RecorderCallback in transformers' Trainer and TRL's SFTTrainer, on tiny models with random weights."""

import sys
import warnings
from pathlib import Path

import frameworks
import pytest
import torch
from together import run_together

import gradindex
from gradindex.checkpoint import read_record
from gradindex.errors import ArgumentError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of trainers that run without a GPU
]


def load():
    """Imported where it is used: collecting tests takes no trainer."""
    global transformers, RecorderCallback
    transformers = frameworks.imported("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gradindex.integrations.hf import RecorderCallback


@pytest.fixture(autouse=True, scope="module")
def loaded():
    load()


def classifier():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=2,
        max_position_embeddings=8,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def examples(n=24):
    torch.manual_seed(1)
    tokens = torch.randint(1, 20, (n, 6))
    return [{"input_ids": row, "labels": int(row[0] > 9)} for row in tokens]


def trainer_of(folder, *callbacks, model=None, eval_dataset=None, **options):
    defaults = {
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 0.01, "report_to": "none",
        "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 3, "logging_steps": 1,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(output_dir=str(folder / "out"), **(defaults | options))
    return transformers.Trainer(
        model or classifier(), arguments, train_dataset=examples(), eval_dataset=eval_dataset,
        callbacks=list(callbacks),
    )  # fmt: skip


def rates(folder):
    found = {}
    for path in sorted(folder.glob("*.pt")):
        record = read_record(path)
        group = next(g for g in record["groups"] if "classifier.weight" in g["parameters"])
        found[record["step"]] = (group["learning_rate"], group["learning_rate_sum"], group["steps"])
    return found


def test_the_rates_are_those_that_the_steps_used(tmp_path):
    trainer = trainer_of(tmp_path, RecorderCallback(tmp_path / "ck", every=5))
    trainer.train()
    # 24 examples, batches of 4, 2 epochs: 12 steps of a linear schedule that ends at 0, behind the last one.
    used = [0.01 * (1 - step / 12) for step in range(12)]
    assert rates(tmp_path / "ck") == {
        5: (pytest.approx(used[4]), pytest.approx(sum(used[:5])), 5),
        10: (pytest.approx(used[9]), pytest.approx(sum(used[5:10])), 5),
        12: (pytest.approx(used[11]), pytest.approx(sum(used[10:])), 2),
    }
    last = gradindex.Checkpoint(tmp_path / "ck" / "step_00000012.pt").load(classifier())
    assert all(torch.equal(last[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_a_step_is_the_optimizers_where_gradients_are_accumulated(tmp_path):
    callback = RecorderCallback(tmp_path / "ck", count=3)
    trainer_of(tmp_path, callback, gradient_accumulation_steps=2, lr_scheduler_type="constant").train()
    assert rates(tmp_path / "ck") == {step: (0.01, pytest.approx(0.02), 2) for step in (2, 4, 6)}


def test_settings_of_the_optimizer_are_recorded(tmp_path):
    options = {"optim": "sgd", "optim_args": "momentum=0.5", "weight_decay": 0.25, "lr_scheduler_type": "constant"}
    trainer_of(tmp_path, RecorderCallback(tmp_path / "ck", at=[3]), max_grad_norm=0.0, **options).train()
    (path,) = (tmp_path / "ck").iterdir()
    groups = {name: g for g in read_record(path)["groups"] for name in g["parameters"]}
    head, bias = groups["classifier.weight"], groups["classifier.bias"]
    assert (head["optimizer"], head["settings"]["momentum"]) == ("SGD", 0.5)
    assert (head["settings"]["weight_decay"], bias["settings"]["weight_decay"]) == (0.25, 0.0)
    # The buffer holds 1, 1 + 1/2 and 1 + 1/2 + 1/4 gradients.
    assert head["effective_sum"] == pytest.approx(0.01 * (1 + 1.5 + 1.75))
    trainer_of(tmp_path, RecorderCallback(tmp_path / "clipped", at=[3]), **options, logging_steps=2).train()
    (path,) = (tmp_path / "clipped").iterdir()
    assert not any("effective_sum" in group for group in read_record(path)["groups"])  # clipped, nobody knows how much


def clipping(folder):
    """What checkpoints hold of the head: the mean factor of clipping and the effective sum."""
    found = {}
    for path in sorted(folder.glob("*.pt")):
        record = read_record(path)
        group = next(g for g in record["groups"] if "classifier.weight" in g["parameters"])
        found[record["step"]] = (group.get("clipping_factor"), group.get("effective_sum"))
    return found


def clipped_run(tmp_path, *callbacks, **options):
    """A run of SGD with momentum that is clipped much, and the factors by which accelerate clipped."""
    sgd = {"optim": "sgd", "optim_args": "momentum=0.5", "learning_rate": 0.1, "max_grad_norm": 0.5}
    recorder = RecorderCallback(tmp_path / "ck", every=5)
    trainer = trainer_of(tmp_path, recorder, *callbacks, lr_scheduler_type="constant", **sgd | options)
    factors, clip = [], trainer.accelerator.clip_grad_norm_

    def watched(parameters, max_norm, *rest):
        before = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
        norm = clip(parameters, max_norm, *rest)
        after = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        factors.append(float(sum(a.norm() ** 2 for a in after) / sum(b.norm() ** 2 for b in before)) ** 0.5)
        return norm

    trainer.accelerator.clip_grad_norm_ = watched
    trainer.train()
    assert min(factors) < 0.9
    return factors, trainer


@pytest.mark.parametrize("several", [1, 2])
def test_factors_of_clipping_are_those_of_the_steps_where_each_is_logged(tmp_path, several):
    factors, trainer = clipped_run(tmp_path, gradient_accumulation_steps=several, num_train_epochs=2 * several)
    buffer, shares = 0.0, []
    for number, factor in enumerate(factors):
        buffer = factor if number == 0 else 0.5 * buffer + factor
        shares.append(buffer)
    spans = {5: slice(0, 5), 10: slice(5, 10), 12: slice(10, 12)}
    expected = {
        step: (
            pytest.approx(sum(factors[span]) / len(factors[span]), rel=1e-4),
            pytest.approx(0.1 * sum(shares[span]), rel=1e-4),
        )
        for step, span in spans.items()
    }
    assert clipping(tmp_path / "ck") == expected
    last = gradindex.Checkpoint(tmp_path / "ck" / "step_00000012.pt").load(classifier())
    assert all(torch.equal(last[name], tensor) for name, tensor in trainer.model.state_dict().items())


def test_once_a_step_is_not_logged_nothing_is_said_of_clipping(tmp_path):
    class Silent(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_log = state.global_step != 10

    clipped_run(tmp_path, Silent())
    first, *others = clipping(tmp_path / "ck").items()
    assert first[0] == 5 and None not in first[1]
    assert others == [(10, (None, None)), (12, (None, None))]
    second = tmp_path / "seldom"
    clipped_run(second, logging_steps=2)
    assert clipping(second / "ck") == dict.fromkeys((5, 10, 12), (None, None))


def test_factors_of_clipping_are_kept_where_a_training_is_resumed(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 6}
    clipped_run(tmp_path / "whole", **options)
    clipped_run(tmp_path / "parts", **options)
    trainer = trainer_of(
        tmp_path / "parts", RecorderCallback(tmp_path / "parts" / "ck", every=5), lr_scheduler_type="constant",
        optim="sgd", optim_args="momentum=0.5", learning_rate=0.1, max_grad_norm=0.5, **options,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "out" / "checkpoint-6"))
    whole, parts = clipping(tmp_path / "whole" / "ck"), clipping(tmp_path / "parts" / "ck")
    assert {step: pytest.approx(pair, rel=1e-5) for step, pair in whole.items()} == parts


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_training_is_recorded_as_one_that_was_not(tmp_path, restore):
    options = {"save_strategy": "steps", "save_steps": 6, "restore_callback_states_from_checkpoint": restore}
    trainer_of(tmp_path, RecorderCallback(tmp_path / "whole", every=4), **options).train()
    # Two callbacks are told apart; one checkpoint of an abandoned run lies behind the step of resumption.
    callbacks = [RecorderCallback(tmp_path / name, every=4) for name in ("other", "parts")]
    trainer_of(tmp_path, *callbacks, **options).train()
    (tmp_path / "parts" / "step_00000011.pt").touch()
    again = [RecorderCallback(tmp_path / name, every=4) for name in ("other", "parts")]
    trainer_of(tmp_path, *again, **options).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-6"))
    whole, parts = (gradindex.find_checkpoints(tmp_path / name) for name in ("whole", "parts"))
    assert [item.step for item in parts] == [4, 8, 12]
    assert rates(tmp_path / "parts") == rates(tmp_path / "other") == rates(tmp_path / "whole")
    for one, other in zip(whole, parts, strict=True):
        expected, found = one.load(classifier()), other.load(classifier())
        assert all(torch.allclose(found[name], tensor) for name, tensor in expected.items())


def test_another_trainings_checkpoints_are_not_mixed_in(tmp_path):
    trainer_of(tmp_path, RecorderCallback(tmp_path / "ck", count=1)).train()
    with pytest.raises(ArgumentError, match="already holds 1 checkpoints of another training"):
        trainer_of(tmp_path, RecorderCallback(tmp_path / "ck", count=1)).train()
    trainer_of(tmp_path, RecorderCallback(tmp_path / "ck", at=[7], overwrite=True)).train()
    assert list(rates(tmp_path / "ck")) == [7]


def test_the_best_model_is_not_taken_for_the_last(tmp_path, capsys):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    callback = RecorderCallback(tmp_path / "ck", every=5)
    trainer_of(tmp_path, callback, load_best_model_at_end=True, eval_dataset=examples(4), **options).train()
    assert list(rates(tmp_path / "ck")) == [5, 10]
    assert "The steps up to 12 have no checkpoint of their own" in capsys.readouterr().err


def test_only_the_adapter_of_a_lora_training_is_saved(tmp_path):
    peft = frameworks.imported("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
    trainer = trainer_of(
        tmp_path,
        RecorderCallback(tmp_path / "ck", at=[4], only_trained=True),
        model=peft.get_peft_model(classifier(), config),
        max_steps=4,
    )
    trainer.train()
    (path,) = (tmp_path / "ck").iterdir()
    content = torch.load(path, weights_only=True)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert content["gradindex"]["only_trained"] is True
    assert trained <= set(content["model"])
    assert all(torch.equal(content["model"][name], trainer.model.state_dict()[name]) for name in trained)
    others = set(content["model"]) - trained
    assert others <= {name for name, _ in trainer.model.named_buffers()}
    fresh = peft.get_peft_model(classifier(), config)
    (found,) = gradindex.find_checkpoints(tmp_path / "ck", base="model")
    weights = found.load(fresh)
    expected = trainer.model.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert found.learning_rates(sorted(trained)) == pytest.approx(dict.fromkeys(trained, 0.01 / 4))


def test_trls_trainer_is_recorded(tmp_path):
    trl = frameworks.imported("trl")
    datasets = frameworks.imported("datasets")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    )
    tokens = frameworks.imported("tokenizers")
    words = tokens.Tokenizer(tokens.models.WordLevel({"<e>": 0, "a": 1, "b": 2, "c": 3}, unk_token="<e>"))
    words.pre_tokenizer = tokens.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", pad_token="<e>")
    data = datasets.Dataset.from_dict({"text": ["a b c a", "b c", "c a b", "a a b"] * 4})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, num_train_epochs=2, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, bf16=False, learning_rate=0.01, max_length=16,
        lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=data, processing_class=tokenizer,
        callbacks=[RecorderCallback(tmp_path / "ck", count=2)],
    )  # fmt: skip
    trainer.train()
    found = gradindex.find_checkpoints(tmp_path / "ck", weighting="integrated")
    assert [(item.step, item.learning_rates(["transformer.wte.weight"])) for item in found] == [
        (step, {"transformer.wte.weight": pytest.approx(0.04)}) for step in (4, 8)
    ]


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs torch.distributed with gloo",
)
def test_of_two_processes_the_first_writes(tmp_path):
    # The file itself is run by both, in the place of a user's script.
    run_together(Path(__file__), tmp_path)
    used = [0.01 * (1 - step / 6) for step in range(6)]
    # Each process takes a batch of 4 in a step, so 2 epochs of 24 examples are 6 steps.
    assert rates(tmp_path / "ck") == {
        3: (pytest.approx(used[2]), pytest.approx(sum(used[:3])), 3),
        6: (pytest.approx(used[5]), pytest.approx(sum(used[3:])), 3),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    load()
    trainer = trainer_of(folder, RecorderCallback(folder / "ck", count=2), ddp_backend="gloo")
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    torch.distributed.destroy_process_group()
