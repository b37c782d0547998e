"""Scores judged by retraining: the measures against naive ones, retrainings as jobs, and a store's table."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from torch import nn

import gradindex
from gradindex import evaluation
from gradindex.errors import ArgumentError, GradIndexError, LossError, MismatchError, StoreError, TaskError
from gradindex.evaluation import GroundTruth, all_but, random_subsets, retrain
from gradindex.projection import Projection

IDS = np.arange(40)


def trained(task, ids, seed, calls=None, steps=8):
    """A few steps of gradient descent on all of ``ids``."""
    if calls is not None:
        calls.append((ids.tolist(), seed))
    torch.manual_seed(seed)
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    x, y = (tensor[ids] for tensor in task.train.tensors)
    for _ in range(steps):
        optimizer.zero_grad()
        toys.cross_entropy(model, (x.float(), y)).mean().backward()
        optimizer.step()
    return model


@pytest.fixture
def task(tmp_path):
    made = toys.make_task(tmp_path, n_train=40, n_query=6)
    return replace(made, train_model=partial(trained, made))


@pytest.fixture
def counted(task):
    """The task, and the list of its trainings."""
    calls = []
    return replace(task, train_model=partial(trained, task, calls=calls)), calls


def naive_ranks(values):
    return [sum(other < value for other in values) + (1 + sum(other == value for other in values)) / 2
            for value in values]  # fmt: skip


def naive_lds(scores, subsets, losses):
    found = []
    for query, of_query in enumerate(scores):
        sums = [sum(score for score, held in zip(of_query, subset, strict=True) if held) for subset in subsets]
        found.append(np.corrcoef(naive_ranks(sums), naive_ranks(-losses[:, query]))[0, 1])
    return found


def test_lds_is_spearmans_correlation_over_subsets_with_average_ranks_for_ties():
    generator = np.random.default_rng(0)
    scores = generator.integers(-3, 4, size=(5, 12))  # whole numbers, whose sums tie
    subsets, losses = random_subsets(12, 9), generator.integers(4, size=(9, 5)).astype(float)
    found = evaluation.lds(scores, subsets, losses)
    np.testing.assert_allclose(found.correlations, naive_lds(scores, subsets, losses), atol=1e-12)
    assert found.mean == pytest.approx(np.mean(found.correlations))
    assert found.standard_error == pytest.approx(np.std(found.correlations, ddof=1) / math.sqrt(5))


def test_a_positive_score_says_that_the_example_lowers_the_loss():
    subsets = random_subsets(10, 8)
    scores = np.random.default_rng(0).standard_normal((2, 10))
    losses = 3 - (scores @ subsets.T).T
    assert evaluation.lds(scores, subsets, losses).mean == pytest.approx(1)
    assert evaluation.lds(-scores, subsets, losses).mean == pytest.approx(-1)


def test_queries_that_nothing_tells_apart_are_left_out_and_counted():
    generator = np.random.default_rng(0)
    scores, losses = generator.standard_normal((4, 50)), generator.standard_normal((6, 4))
    scores[1], losses[:, 2] = 0.1, 7.0  # the sums of 0.1 differ by rounding alone
    found = evaluation.lds(scores, random_subsets(50, 6), losses)
    assert np.isnan(found.correlations).tolist() == [False, True, True, False]
    assert (found.counted, found.left_out) == (2, 2)
    assert found.mean == pytest.approx(np.mean(found.correlations[[0, 3]]))
    nothing = evaluation.lds(np.zeros((4, 50)), random_subsets(50, 6), losses)
    assert nothing.counted == 0
    assert math.isnan(nothing.mean)
    assert math.isnan(nothing.standard_error)


def test_a_perfect_predictor_of_noisy_losses_reaches_the_ceiling():
    generator = np.random.default_rng(0)
    subsets, scores = random_subsets(40, 600), generator.standard_normal((30, 40))
    expected = -(scores @ subsets.T).T
    noise = generator.standard_normal((3, 600, 30)) * expected.std(0)
    losses = expected + noise
    found = evaluation.ceiling(losses)
    assert found.n_seeds == 3
    assert evaluation.lds(scores, subsets, losses[0]).mean == pytest.approx(found.of_one, abs=0.01)
    assert evaluation.lds(scores, subsets, losses.mean(0)).mean == pytest.approx(found.of_mean, abs=0.01)
    assert 0.6 < found.of_one < found.of_mean - 0.1
    unrelated = evaluation.ceiling(generator.standard_normal((2, 60, 200)))
    assert unrelated.of_one < 0.25


def test_the_correlation_of_seeds_is_the_mean_over_pairs():
    losses = np.random.default_rng(0).standard_normal((3, 7, 2))
    pairs = [
        np.corrcoef(naive_ranks(losses[a, :, q]), naive_ranks(losses[b, :, q]))[0, 1]
        for a, b in ((0, 1), (0, 2), (1, 2))
        for q in range(2)
    ]
    assert evaluation.ceiling(losses).correlation == pytest.approx(np.mean(pairs))


def test_bootstrap_resamples_queries_and_seeds():
    generator = np.random.default_rng(0)
    by_query = np.tile(generator.standard_normal(400), (4, 1))
    found = evaluation.bootstrap(by_query)
    assert found.mean == pytest.approx(by_query.mean())
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * by_query[0].std() / 20, rel=0.1)
    of_seeds = evaluation.bootstrap(np.array([[0.0], [1.0], [0.0], [1.0]]) + 0 * by_query)
    assert (of_seeds.low, of_seeds.high) == (0, 1)  # means of four coins
    assert evaluation.bootstrap(by_query) == found


def test_roc_auc_counts_pairs():
    suspicion, wrong = np.array([3, 1, 2, 2, 0.0]), np.array([True, False, True, False, False])
    pairs = [(a, b) for a in suspicion[wrong] for b in suspicion[~wrong]]
    assert evaluation.roc_auc(suspicion, wrong) == np.mean([(a > b) + (a == b) / 2 for a, b in pairs])
    for mislabelled, said in ((~wrong & wrong, "no true value"), (wrong | ~wrong, "no false value")):
        with pytest.raises(ArgumentError, match=said):
            evaluation.roc_auc(suspicion, mislabelled)


def test_random_subsets_are_different_ones_of_one_size_and_more_of_them_begin_with_the_same():
    some, more = random_subsets(7, 20, seed=3), random_subsets(7, 30, seed=3)
    assert (more.sum(1) == 4).all()
    assert len(np.unique(more, axis=0)) == 30
    np.testing.assert_array_equal(more[:20], some)
    assert not (random_subsets(7, 20, seed=4) == some).all()
    assert random_subsets(100, 2, share=0.99).sum(1).tolist() == [99, 99]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"count": 1}, "There are 1 subsets, but a correlation over them needs at least 2"),
        ({"share": 1}, "share is 1, but must be between 0 and 1"),
        ({"share": 0.01}, "A share of 0.01 of 7 training examples is 0 of them"),
        ({"count": 36}, "too few different subsets of 4 for 36 retrainings"),
        ({"seed": -1}, "seed is -1, but must be at least 0"),
    ],
)
def test_subsets_that_there_cannot_be_are_refused(asked, said):
    with pytest.raises(ArgumentError, match=said):
        random_subsets(7, **asked)


def test_all_but_some_are_what_a_group_leaves():
    ids = np.array([2, 3, 5, 8])
    assert all_but(ids, [[3], [2, 8]]).tolist() == [[True, False, True, True], [False, True, True, False]]
    for groups, said in (
        ([[4]], "holds 4, which is no id"), ([[3], []], "Group 1 leaves out no"), ([[9]], "holds 9"),
        ([[2, 3, 5, 8]], "leaves out all"), ([[3, 3]], "holds 3 twice"), ([[0.5]], "must be a list of training ids"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=said):
            all_but(ids, groups)


def test_ground_truth_from_elsewhere_takes_masks_lists_and_seeds():
    losses = np.random.default_rng(0).random((2, 3, 5))
    lists = [[0, 2], [1, 3], [0, 1]]
    of_lists = GroundTruth.of(lists, losses, n_train=4)
    of_mask = GroundTruth.of(of_lists.subsets, losses[0])
    assert of_lists.subsets.tolist() == [[i in held for i in range(4)] for held in lists]
    assert (of_lists.n_seeds, of_mask.n_seeds, of_mask.n_query) == (2, 1, 5)
    np.testing.assert_array_equal(of_lists.mean_losses, losses.mean(0))
    assert of_lists.ceiling.correlation == evaluation.ceiling(losses).correlation
    assert of_mask.ceiling is None
    assert GroundTruth.of([[5], [9]], losses[:, :2], ids=[5, 7, 9]).subsets.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_dattris_target_values_are_minus_losses():
    losses, indices = np.random.default_rng(0).random((3, 5)), torch.tensor([[0, 2], [1, 3], [0, 1]])
    found = GroundTruth.from_dattri((torch.tensor(-losses), indices), n_train=4)
    np.testing.assert_array_equal(found.losses[0], losses)
    np.testing.assert_array_equal(found.subsets[1], [False, True, False, True])
    as_losses = GroundTruth.from_dattri((losses, indices.numpy()), 4, values="losses")
    np.testing.assert_array_equal(as_losses.losses, found.losses)
    np.testing.assert_array_equal(GroundTruth.from_dattri((losses, indices), 4, "margins").losses, -found.losses)
    with pytest.raises(ArgumentError, match="No target value is negative, so they are no minus losses"):
        GroundTruth.from_dattri((losses, indices), 4)


LOSSES = np.ones((3, 5))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GroundTruth.of([[0], [1]], LOSSES, n_train=4), r"with 2 subsets they must be of shape \(2, n_query\)"),
        (lambda: GroundTruth.of([[0], [1], [9]], LOSSES, n_train=4), "Subset 2 holds 9, which is no id"),
        (lambda: GroundTruth.of([[0], [1], [2]], LOSSES), "Give n_train"),
        (lambda: GroundTruth.of([[0]], LOSSES[:1], n_train=4), "There are 1 subsets, but a correlation needs"),
        (lambda: GroundTruth.of(np.eye(3, 4) > 0, LOSSES, n_train=5), r"must be of shape \(m, 5\)"),
        (lambda: GroundTruth.of(np.eye(3) > 0, LOSSES * math.inf), "loss of query 0 under subset 0 is inf"),
        (lambda: GroundTruth.of(np.eye(3) > 0, [[1, 2], [3], [4]]), "losses are no array of numbers"),
        (lambda: GroundTruth.of(np.eye(3) > 0, LOSSES[:, :0]), "there are none"),
        (lambda: GroundTruth.from_dattri((LOSSES, np.ones((2, 2), int)), 4), "a row for each model"),
        (lambda: GroundTruth.from_dattri((LOSSES, np.ones((3, 2), int)), 4, "logits"), "values is 'logits'"),
        (lambda: GroundTruth.from_dattri((LOSSES,), 4), "has 1 parts"),
        (lambda: evaluation.lds(np.ones((5, 3)), np.eye(3, 4) > 0, LOSSES), "Give a score for each example"),
        (lambda: evaluation.lds(np.ones((5, 3)), np.eye(3) > 0, LOSSES.T), "a row for each subset"),
        (lambda: evaluation.lds(np.ones((5, 3)) * math.nan, np.eye(3) > 0, LOSSES), "scores have a NaN"),
        (lambda: evaluation.lds(np.ones((5, 3)), np.eye(3)[:1] > 0, LOSSES[:1]), "There are 1 subsets"),
        (lambda: evaluation.ceiling(LOSSES[None]), "at least 2 seeds and 2 subsets"),
    ],
)
def test_shapes_and_values_that_do_not_fit_are_refused(make, said):
    with pytest.raises((ArgumentError, gradindex.errors.DimensionMismatchError), match=said):
        make()


def test_retrain_gives_each_querys_loss_under_each_model(task, tmp_path):
    subsets = random_subsets(40, 3)
    found = retrain(task, tmp_path / "out", subsets, seeds=[4, 1])
    assert found.losses.shape == (2, 3, 6)
    x, y = task.query.tensors
    for place, seed in enumerate((4, 1)):
        for number, subset in enumerate(subsets):
            model = trained(task, IDS[subset], seed).double().eval()
            losses = toys.cross_entropy(model, (x, y)).detach()
            np.testing.assert_allclose(found.losses[place, number], losses, rtol=1e-5)
    assert 0 < found.seconds < 10
    assert repr(found) == "<GroundTruth: 3 subsets of 40 training examples, 2 seeds, 6 queries>"


def test_losses_are_those_of_queries_in_eval_mode_by_the_query_loss_and_collate(tmp_path):
    def collate(items):
        return torch.stack([x for x, _ in items]), torch.tensor([int(y) for _, y in items]), len(items)

    def margin(model, batch):
        x, y, n = batch
        assert n == 2  # batches are of the size that was asked for
        return -model(x)[torch.arange(n), y]

    made = toys.make_task(
        tmp_path, nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.9), nn.Linear(5, 3)),
        query_loss=margin, collate=collate,
    )  # fmt: skip
    models = []

    def train_model(ids, seed):
        models.append(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.9), nn.Linear(5, 3)).half())
        torch.manual_seed(int(ids.sum()))
        toys.randomise(models[-1])
        return models[-1]

    found = retrain(replace(made, train_model=train_model), tmp_path / "out", random_subsets(12, 2), batch_size=2)
    x, y = made.query.tensors
    assert models[0].training
    model = models[0].double().eval()
    np.testing.assert_allclose(found.losses[0, 0], -model(x)[range(4), y].detach(), rtol=1e-4)


def test_where_predictions_are_explained_the_labels_are_the_last_checkpoints(tmp_path):
    made = toys.make_task(tmp_path, loss=gradindex.losses.cross_entropy(), query_loss="predicted", n_train=40)
    found = retrain(replace(made, train_model=partial(trained, made)), tmp_path / "out", random_subsets(40, 2))
    final = toys.mlp().double()
    final.load_state_dict(made.checkpoints[-1].load(final))
    x = made.query.tensors[0]
    model = trained(made, IDS[random_subsets(40, 2)[0]], 0).double()
    losses = toys.cross_entropy(model, (x, final(x).argmax(1))).detach()
    np.testing.assert_allclose(found.losses[0, 0], losses, rtol=1e-5)


def test_what_was_trained_is_not_trained_again_whoever_asks(counted, tmp_path):
    task, calls = counted
    first = retrain(task, tmp_path / "out", random_subsets(40, 3), seeds=1)
    assert len(calls) == 3
    both = retrain(task, tmp_path / "out", random_subsets(40, 4), seeds=[0, 7])
    assert len(calls) == 8
    np.testing.assert_array_equal(both.losses[0, :3], first.losses[0])
    retrain(
        task, tmp_path / "out", all_but(IDS, [np.flatnonzero(~subset) for subset in random_subsets(40, 3)]), seeds=1
    )
    assert len(calls) == 8
    assert [ids == IDS[subset].tolist() for (ids, _), subset in zip(calls, random_subsets(40, 3), strict=False)]


def test_processes_and_parts_make_what_one_process_makes(task, tmp_path):
    subsets = random_subsets(40, 4)
    toys.cross_entropy(trained(task, IDS, 0), (task.train.tensors[0].float(), task.train.tensors[1])).sum().backward()
    alone = retrain(task, tmp_path / "alone", subsets)
    np.testing.assert_allclose(retrain(task, tmp_path / "two", subsets, processes=2).losses, alone.losses, rtol=1e-5)
    parts = [retrain(task, tmp_path / "parts", subsets, part=(i, 3)) for i in (1, 2, 3)]
    assert parts == [None] * 3
    never = replace(task, train_model=lambda ids, seed: pytest.fail("it was trained by the parts"))
    np.testing.assert_array_equal(retrain(never, tmp_path / "parts", subsets).losses, alone.losses)
    assert len(list((tmp_path / "parts").glob("*-[01].json"))) == 8


def test_an_error_keeps_what_was_finished_and_names_subset_and_seed(counted, tmp_path):
    task, calls = counted
    subsets = random_subsets(40, 4)

    def fails(ids, seed):
        if len(calls) == 3:
            raise ZeroDivisionError("no more")
        return task.train_model(ids, seed)

    with pytest.raises(gradindex.errors.UserCodeError) as caught:
        retrain(replace(task, train_model=fails), tmp_path / "out", subsets)
    assert str(caught.value) == "train_model (subset 3 (20 examples), seed 0) failed: ZeroDivisionError: no more."
    retrain(task, tmp_path / "out", subsets)
    assert len(calls) == 8
    with pytest.raises(
        gradindex.errors.UserCodeError, match=r"train_model \(subset \d \(20 examples\), seed 0\) failed"
    ):
        retrain(replace(task, train_model=fails_always), tmp_path / "forked", subsets, processes=2)


def fails_always(ids, seed):
    raise ZeroDivisionError


def test_retrainings_leave_the_random_state_and_the_model_alone(task, tmp_path):
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    weights = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    retrain(task, tmp_path / "out", random_subsets(40, 2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in task.model.state_dict().items())


def test_a_function_that_draws_without_seeding_trains_by_its_seed(task, tmp_path):
    def unseeded(ids, seed):
        return trained(task, ids, int(torch.randint(100, ()) + np.random.randint(100) + random.randrange(100)))

    asked = replace(task, train_model=unseeded)
    first = retrain(asked, tmp_path / "a", random_subsets(40, 2))
    torch.rand(3), np.random.random(3), random.random()  # the states are others now
    np.testing.assert_array_equal(retrain(asked, tmp_path / "b", random_subsets(40, 2)).losses, first.losses)
    assert not np.array_equal(*first.losses)


def diverged(model):
    with torch.no_grad():
        model[2].bias[0] = math.nan
    return model


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda task: None, "The task has no train_model, so nothing can be retrained"),
        (lambda task: lambda ids, seed: task.model, "returned the task's own model"),
        (lambda task: lambda ids, seed: 3, r"train_model \(subset 0 \(20 examples\), seed 0\) returned a int"),
        (lambda task: lambda ids, seed: toys.regressor(), r"The model's 2.weight has shape \(1, 5\), but the task's"),
        (lambda task: lambda ids, seed: nn.Linear(6, 3), "The model has no parameter 0.weight"),
        (
            lambda task: lambda ids, seed: nn.Sequential(*toys.mlp(), nn.Linear(3, 3)),
            "has the parameter 3.weight, which the task's model has not",
        ),
        (
            lambda task: lambda ids, seed: trained(task, IDS, seed),
            r"train_model ignores its ids, or trains nothing: all",
        ),
        (
            lambda task: lambda ids, seed: diverged(trained(task, ids, seed)),
            r"The loss of query 0 is nan under the model of train_model \(subset 0 \(20 examples\), seed 0\) \(6 quer",
        ),
    ],
)
def test_training_functions_that_cannot_be_right_are_refused(task, tmp_path, make, said):
    with pytest.raises((TaskError, LossError), match=said):
        retrain(replace(task, train_model=make(task)), tmp_path / "out", random_subsets(40, 3))
    assert not list((tmp_path / "out").glob("*-0.json"))  # nothing that cannot be right is kept


@pytest.mark.parametrize("processes", [1, 2])
def test_ids_that_are_ignored_are_noticed_after_the_first_two_trainings(task, tmp_path, processes):
    calls = tmp_path / "calls"

    def ignores(ids, seed):
        with calls.open("a") as file:
            file.write("x")
        return trained(task, IDS, seed)

    with pytest.raises(TaskError, match="ignores its ids"):
        retrain(replace(task, train_model=ignores), tmp_path / "out", random_subsets(40, 60), processes=processes)
    assert len(calls.read_text()) == 2 if processes == 1 else len(calls.read_text()) < 60


def test_what_is_asked_wrongly_is_refused(task, tmp_path):
    subsets = random_subsets(40, 2)
    for options, said in (
        ({"seeds": [0, 1, 0]}, r"seeds are \[0, 1, 0\], but must be different numbers"),
        ({"seeds": 0}, r"seeds are \[\]"),
        ({"seeds": [-1]}, r"seeds are \[-1\]"),
        ({"seeds": 1.5}, "seeds is 1.5, a float, but must be an integer"),
        ({"processes": 0}, "processes is 0, but must be at least 1"),
        ({"part": (3, 2)}, "part is 3/2"),
        ({"subsets": subsets[:, :3]}, r"must be bool of shape \(m, 40\)"),
        ({"subsets": subsets & ~subsets}, "Subset 0 is empty"),
    ):
        with pytest.raises(ArgumentError, match=said):
            retrain(task, tmp_path / "out", **({"subsets": subsets} | options))
    with pytest.raises(TaskError, match="The task has no query"):
        retrain(replace(task, query=None), tmp_path / "out", subsets)
    with pytest.raises(TaskError, match="train_model is a int, but must be a function"):
        replace(task, train_model=3)


def test_a_folder_of_other_retrainings_says_what_differs(task, tmp_path):
    retrain(task, tmp_path / "out", random_subsets(40, 2), seeds=1)
    few, x = task.query.tensors[0][:5], task.train.tensors[0].clone()
    x[39] += 1
    other = replace(
        task, query=torch.utils.data.TensorDataset(few, task.query.tensors[1][:5]),
        train=torch.utils.data.TensorDataset(x, task.train.tensors[1]),
    )  # fmt: skip
    with pytest.raises(MismatchError, match="another task: training examples; number of queries; queries differ"):
        retrain(other, tmp_path / "out", random_subsets(40, 2), seeds=1)
    with pytest.raises(MismatchError, match="which training examples there are"):
        retrain(replace(task, skip=[3]), tmp_path / "out", random_subsets(39, 2), seeds=1)
    with pytest.raises(MismatchError, match="another task: parameters of the model differ"):
        retrain(replace(task, model=toys.regressor()), tmp_path / "out", random_subsets(40, 2), seeds=1)
    retrain(replace(task, columns={"number": IDS}, name="renamed"), tmp_path / "out", random_subsets(40, 2), seeds=1)


def test_damaged_and_foreign_files_are_not_taken_for_retrainings(task, tmp_path):
    subsets = random_subsets(40, 2)
    retrain(task, tmp_path / "out", subsets, seeds=1)
    path = next((tmp_path / "out").glob("*-0.json"))
    path.write_text(path.read_text().replace("0.", "1.", 1))
    with pytest.raises(StoreError, match=r"is damaged \(its contents do not match its checksum\). Delete it"):
        retrain(task, tmp_path / "out", subsets, seeds=1)
    (tmp_path / "out" / "retrainings.json").write_text("{}")
    with pytest.raises(StoreError, match="retrainings.json is damaged"):
        retrain(task, tmp_path / "out", subsets, seeds=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(StoreError, match=r"holds other files, such as thesis.tex. Choose a new folder"):
        retrain(task, tmp_path / "other", subsets, seeds=1)


def test_a_training_that_another_process_is_at_is_left_to_it(counted, tmp_path):
    from gradindex.evaluation.judging.retrainings import Retrainings
    from gradindex.files import locked

    task, calls = counted
    retrainings = Retrainings(task, tmp_path / "out")
    job, other = retrainings.jobs(random_subsets(40, 2), [0])
    with locked(tmp_path / "out" / "claims" / job.name):
        assert retrainings.make(job) is None
        assert retrainings.make(other) is not None
    assert len(calls) == 1
    assert retrainings.make(job) is not None


@pytest.fixture
def built(task, tmp_path):
    gradindex.build(task, tmp_path / "store", projection=Projection("none"), batch_size=10)
    return task, tmp_path / "store"


def test_a_stores_scores_are_judged_beside_baselines_and_others(built, tmp_path):
    task, store = built
    exact = gradindex.load(task, store).exact_scores(range(6))
    subsets = random_subsets(40, 12)
    judged = evaluation.judge(task, store, tmp_path / "out", retrainings=12, scores={"negated": -exact})
    truth = retrain(task, tmp_path / "out", subsets)
    of_mean = evaluation.lds(exact, subsets, truth.mean_losses)
    np.testing.assert_allclose(judged["tracin"].of_mean.correlations, of_mean.correlations)
    singly = np.mean([evaluation.lds(exact, subsets, losses).correlations for losses in truth.losses], 0)
    np.testing.assert_allclose(judged["tracin"].of_one.correlations, singly)
    np.testing.assert_allclose(judged["negated"].of_mean.correlations, -of_mean.correlations)
    own = np.broadcast_to(gradindex.GradientStore(store).losses()[:, -1], (6, 40))
    np.testing.assert_allclose(
        judged["loss"].of_mean.correlations, evaluation.lds(own, subsets, truth.mean_losses).correlations
    )
    lines = str(judged).splitlines()
    assert lines[0].split()[:3] == ["scores", "LDS", "+-"]
    assert [line.split()[0] for line in lines[1:5]] == ["tracin", "negated", "loss", "random"]
    assert lines[5].startswith("24 retrainings: 12 subsets of 20 of 40 training examples, 2 seeds, ")
    assert lines[7].startswith(f"ceiling: two seeds correlate {truth.ceiling.correlation:.3g}, so a perfect predictor")
    told = judged.to_dict()
    assert json.loads(json.dumps(told))["records"][0]["lds"] == of_mean.mean
    assert told["ceiling"]["of_mean"] == truth.ceiling.of_mean
    assert judged.to_pandas()["lds"].tolist() == [row.of_mean.mean for row in judged.rows]
    with pytest.raises(KeyError):
        judged["whitened"]


def test_geometries_stand_side_by_side(built):
    task, store = built
    truth = GroundTruth.of(random_subsets(40, 9), np.random.default_rng(0).random((9, 6)))
    with pytest.raises(StoreError, match="gradindex whiten"):
        evaluation.judge(task, store, truth=truth, geometries=["tracin", "whitened"])
    gradindex.store.second_moments(store)
    judged = evaluation.judge(task, store, truth=truth, geometries=["whitened", "tracin"], damping=0.1)
    assert [row.name for row in judged.rows] == ["whitened", "tracin", "loss", "random"]
    for geometry, options in (("tracin", {}), ("whitened", {"geometry": "whitened", "damping": 0.1})):
        exact = gradindex.load(task, store, **options).exact_scores(range(6))
        found = evaluation.lds(exact, truth.subsets, truth.losses[0])
        np.testing.assert_allclose(judged[geometry].of_mean.correlations, found.correlations)
    assert not np.allclose(judged["tracin"].of_mean.correlations, judged["whitened"].of_mean.correlations)
    for options, said in (
        ({"geometries": []}, r"geometries are \[\]"),
        ({"geometries": ["tracin", "tracin"]}, "must be different"),
        ({"damping": 0.1}, "damping"),
    ):
        with pytest.raises(ArgumentError, match=said):
            evaluation.judge(task, store, truth=truth, **options)


def test_ground_truth_made_elsewhere_needs_no_training_function(built):
    task, store = built
    generator = np.random.default_rng(0)
    truth = GroundTruth.of(random_subsets(30, 9), generator.random((9, 6)), ids=IDS[5:35])
    judged = evaluation.judge(replace(task, train_model=None), store, truth=truth)
    exact = gradindex.load(task, store).exact_scores(range(6))[:, 5:35]
    found = evaluation.lds(exact, truth.subsets, truth.losses[0])
    np.testing.assert_allclose(judged["tracin"].of_mean.correlations, found.correlations)
    assert "LDS of one seed" not in str(judged)
    assert str(judged).endswith("ceiling: unknown with one seed")
    assert judged.to_dict()["ceiling"] is None


def test_truth_that_does_not_fit_the_store_is_refused(built, tmp_path):
    task, store = built
    truth = GroundTruth.of(random_subsets(40, 3), np.random.default_rng(0).random((3, 6)))
    for options, said in (
        ({}, "judge needs either out"),
        ({"truth": truth, "out": tmp_path / "out"}, "judge needs either out"),
        ({"truth": GroundTruth.of(truth.subsets, truth.losses[:, :, :4])}, "is of 4 queries, but the task has 6"),
        ({"truth": GroundTruth.of([[1], [50]], truth.losses[:, :2], n_train=60)}, "has no row of 20 of the 60"),
        ({"truth": truth, "scores": {"mine": np.ones((6, 39))}}, r"The scores 'mine' have shape \(6, 39\)"),
        ({"truth": truth, "scores": {"mine": np.full((6, 40), math.nan)}}, "The scores 'mine' have a NaN"),
    ):
        with pytest.raises(GradIndexError, match=said):
            evaluation.judge(task, store, **options)


def test_removing_first_examples_is_compared_with_random_removals(counted, tmp_path):
    task, calls = counted
    curve = evaluation.removal_curve(task, tmp_path / "out", {"mine": [3, 1, 4, 15]}, [5, 0], [1, 3], seeds=2)
    assert len(calls) == 2 * (1 + 2 + 2)
    x, y = (tensor[[5, 0]] for tensor in task.query.tensors)

    def losses(left_out, seed):
        model = trained(task, np.setdiff1d(IDS, left_out), seed).double()
        return toys.cross_entropy(model, (x, y)).detach().numpy()

    for place, left_out in enumerate(([3], [3, 1, 4])):
        for seed in (0, 1):
            expected = losses(left_out, seed) - losses([], seed)
            np.testing.assert_allclose(curve.changes["mine"][place, seed], expected, atol=1e-6)
    random_ids = {
        seed: [set(IDS) - set(ids) for ids, s in calls if s == seed and len(ids) in (39, 37)][2:] for seed in (0, 1)
    }
    for seed, (one, three) in random_ids.items():
        assert (len(one), len(three), one < three) == (1, 3, True)
        np.testing.assert_allclose(
            curve.changes["random"][1, seed], losses(sorted(three), seed) - losses([], seed), atol=1e-6
        )
    assert random_ids[0] != random_ids[1]
    found = curve.change("mine", 3)
    assert found.mean == pytest.approx(curve.changes["mine"][1].mean())
    assert found.low <= found.mean <= found.high
    beyond = curve.beyond_random("mine", 3)
    assert beyond.mean == pytest.approx(found.mean - curve.changes["random"][1].mean())
    assert [line.split()[:2] for line in str(curve).splitlines()[1:5]] == [
        ["mine", "1"], ["mine", "3"], ["random", "1"], ["random", "3"],
    ]  # fmt: skip
    assert curve.to_pandas()["k"].tolist() == [1, 3, 1, 3]
    assert curve.to_dict()["records"][1]["change of loss"] == found.mean


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ks": [0]}, r"ks are \[0\]"), ({"ks": [5]}, r"'mine' has 3 ids, but max\(ks\) is 5"), ({"ks": []}, "ks are"),
        ({"ks": [1, 1]}, "must be different"), ({"queries": [6]}, r"queries are \[6\]"), ({"seeds": 0}, "seeds is 0"),
        ({"rankings": {"random": [1]}}, "Rename it"), ({"rankings": {"mine": [99]}}, "holds 99"),
    ],
)  # fmt: skip
def test_removals_that_there_cannot_be_are_refused(task, tmp_path, options, said):
    asked = {"rankings": {"mine": [1, 2, 3]}, "queries": [0], "ks": [1]} | options
    with pytest.raises(ArgumentError, match=said):
        evaluation.removal_curve(task, tmp_path / "out", **asked)


TASK_FILE = """
import sys
sys.path.insert(0, {tests!r})
import toys, torch
from dataclasses import replace
from pathlib import Path

base = toys.make_task(Path(__file__).parent, n_train=40, n_query=6)
def train_model(ids, seed):
    torch.manual_seed(seed)
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    x, y = (tensor[ids] for tensor in base.train.tensors)
    for _ in range(4):
        optimizer.zero_grad()
        toys.cross_entropy(model, (x.float(), y)).mean().backward()
        optimizer.step()
    return model
task = replace(base, train_model=train_model)
"""


def test_the_command_prints_the_table_of_the_python_answer(tmp_path, monkeypatch):
    from places import TESTS

    monkeypatch.chdir(tmp_path)
    (tmp_path / "judged_task.py").write_text(TASK_FILE.format(tests=str(TESTS)))
    toys.call("build", "judged_task.py:task", "--out", "store", "--projection", "none")
    command = ["judge", "store", "--task", "judged_task.py:task", "--out", "out", "--retrainings", "5"]
    part = toys.call(*command, "--part", "1/2")
    assert part.stdout == "out: part 1/2 is done; once all parts are, run gradindex judge without --part\n"
    assert len(list((tmp_path / "out").glob("*-[01].json"))) == 5
    table = toys.call(*command, "--processes", "2")
    assert table.exit_code == 0
    told = json.loads(toys.call(*command, "--json").stdout)
    assert [row["scores"] for row in told["records"]] == ["tracin", "loss", "random"]
    assert table.stdout.splitlines()[1].split()[:2] == ["tracin", f"{told['records'][0]['lds']:.5g}"]
    assert (told["n_subsets"], told["n_seeds"], told["n_train"], told["n_query"]) == (5, 2, 40, 6)
    assert toys.call("whiten", "store").exit_code == 0
    both = toys.call(*command, "--geometry", "tracin", "--geometry", "whitened")
    assert [line.split()[0] for line in both.stdout.splitlines()[1:5]] == ["tracin", "whitened", "loss", "random"]
    refused = toys.call("judge", "store", "--task", "judged_task.py:base", "--out", "out")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("Error: The task has no train_model, so nothing can be retrained. Give Task(")
    few = toys.call(*command[:-1], "1")
    assert "There are 1 subsets, but a correlation over them needs at least 2" in few.stderr


ASLEEP = """
import os, time
def asleep(ids, seed):
    open(f"asleep-{os.getpid()}", "w").close()
    time.sleep(600)
slow = replace(base, train_model=asleep)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=lambda how: how.name)
def test_processes_that_train_end_with_the_command(tmp_path, monkeypatch, how):
    from places import TESTS

    monkeypatch.chdir(tmp_path)
    (tmp_path / "judged_task.py").write_text(TASK_FILE.format(tests=str(TESTS)) + ASLEEP)
    toys.call("build", "judged_task.py:slow", "--out", "store", "--projection", "none")
    command = ["judge", "store", "--task", "judged_task.py:slow", "--out", "out", "--processes", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "gradindex.cli", *command], stderr=subprocess.PIPE, text=True, start_new_session=True
    )

    def until(reached):
        stop = time.monotonic() + 60
        while not reached():
            assert time.monotonic() < stop
            time.sleep(0.05)

    until(lambda: len(list(tmp_path.glob("asleep-*"))) == 2)
    children = [int(path.name.partition("-")[2]) for path in tmp_path.glob("asleep-*")]
    if how is signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does
        said = process.communicate(timeout=60)[1]
        assert said == "Interrupted. Finished work is kept: rerun the same command to resume.\n"
        assert process.returncode == 130
    else:
        process.kill()
        process.communicate(timeout=60)

    def gone(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")  # nobody asks for its end
        except (FileNotFoundError, ProcessLookupError):
            return True

    until(lambda: all(gone(pid) for pid in children))
