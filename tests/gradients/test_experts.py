"""Mixtures of experts: layers whose rows are tokens of any example, against autograd on each example alone."""

import frameworks
import numpy as np
import pytest
import torch
import toys
from reference import check_against_autograd, gradients
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import gradindex
from gradindex.errors import NonFiniteGradientError
from gradindex.factors import Factors, Formed, Layer, Sum
from gradindex.gradients import Engine, check_routes
from gradindex.gradients.owners import Weights
from gradindex.memory import InseparableError
from gradindex.projection import Projection
from gradindex.stacks import Stacks, concatenated

WIDTH, INNER, EXPERTS = 6, 4, 3
BY_ROWS = {"linear by rows", "function by rows"}


def modules(model, x, chosen, weights):
    out = torch.zeros_like(x)
    for number, expert in enumerate(model.experts):
        row, place = torch.where(chosen == number)
        if len(row):
            out = out.index_add(0, row, expert(x[row]) * weights[row, place, None])
    return out


def one_by_one(model, x, chosen, weights):
    """As the eager experts of Mixtral."""
    out = torch.zeros_like(x)
    for number in chosen.unique():
        row, place = torch.where(chosen == number)
        hidden = torch.tanh(functional.linear(x[row], model.up[number]))
        out.index_add_(0, row, functional.linear(hidden, model.down[number]) * weights[row, place, None])
    return out


def with_biases(model, x, chosen, weights):
    """As the eager experts of GPT-OSS: matrices the other way round."""
    out = torch.zeros_like(x)
    for number in chosen.unique():
        row, place = torch.where(chosen == number)
        hidden = torch.tanh(x[row] @ model.up[number].T + model.up_bias[number])
        out.index_add_(0, row, (hidden @ model.down[number].mT + model.down_bias[number]) * weights[row, place, None])
    return out


def gathered(model, x, chosen, weights):
    """A copy of its matrix for each row."""
    rows, experts = x.repeat_interleave(chosen.shape[1], 0), chosen.flatten()
    hidden = torch.bmm(model.up[experts], rows[:, :, None])[:, :, 0] + model.up_bias[experts]
    out = torch.bmm(torch.tanh(hidden)[:, None], model.down[experts].transpose(1, 2))[:, 0]
    return (out.reshape(*chosen.shape, -1) * weights[:, :, None]).sum(1)


def all_experts(model, x, chosen, weights):
    """Each row through each expert, all of them in one product."""
    shares = torch.zeros(len(x), EXPERTS, dtype=x.dtype).scatter_add(1, chosen, weights)
    hidden = torch.tanh(torch.matmul(x[None].expand(EXPERTS, -1, -1), model.up.transpose(1, 2)))
    return (torch.bmm(model.down, hidden.transpose(1, 2)).transpose(1, 2) * shares.T[:, :, None]).sum(0)


def unusual(model, x, chosen, weights):
    """A product that nobody knows."""
    out = torch.einsum("td,ehd->teh", x, model.up).tanh()
    out = torch.einsum("teh,edh->ted", out, model.down)
    return (out * torch.zeros(len(x), EXPERTS, dtype=x.dtype).scatter_add(1, chosen, weights)[:, :, None]).sum(1)


class Mixture(nn.Module):
    """Words, a router of their flattened tokens, experts, and a class for each example."""

    def __init__(self, run=one_by_one, k=2, kept=False):
        super().__init__()
        self.words, self.router, self.head = nn.Embedding(9, WIDTH), nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 3)
        self.run, self.k, self.kept = run, k, kept
        if run is modules:
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(WIDTH, INNER), nn.Tanh(), nn.Linear(INNER, WIDTH)) for _ in range(EXPERTS)
            )
        else:
            self.up = nn.Parameter(torch.ones(EXPERTS, INNER, WIDTH))
            self.down = nn.Parameter(torch.ones(EXPERTS, WIDTH, INNER))
        if run in (with_biases, gathered):
            self.up_bias = nn.Parameter(torch.ones(EXPERTS, INNER))
        if run is with_biases:
            self.down_bias = nn.Parameter(torch.ones(EXPERTS, WIDTH))

    def mixed(self, x):
        tokens = x.reshape(-1, WIDTH)
        weights, chosen = self.router(tokens).softmax(1).topk(self.k, 1)
        return self.run(self, tokens, chosen, weights).reshape(x.shape)

    def forward(self, words):
        x = self.words(words)
        x = x + (checkpoint(self.mixed, x, use_reentrant=False) if self.kept else self.mixed(x))
        return self.head((torch.tanh(x) * (words > 0)[:, :, None]).sum(1))


def lists(n, generator):
    return [(torch.randint(1, 9, (1 + i % 5,), generator=generator), i % 3) for i in range(n)]


def collate(items):
    return pad_sequence([words for words, _ in items], batch_first=True), torch.tensor([y for _, y in items])


def task_of(folder, model, n=12, **options):
    generator = torch.Generator().manual_seed(1)
    data = {"train": lists(n, generator), "query": lists(4, generator), "collate": collate}
    return toys.make_task(folder, model, **data | options)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("run", [modules, one_by_one, with_biases, gathered, all_experts])
def test_experts_are_taken_by_rows_and_equal_autograd(tmp_path, run, k):
    routes = check_against_autograd(task_of(tmp_path, Mixture(run, k)))
    assert {name for name, route in routes.items() if route not in BY_ROWS} == {"words", "head"}


@pytest.mark.slow
@pytest.mark.parametrize("run", [modules, one_by_one, with_biases])
def test_experts_that_are_run_again_on_the_way_back_equal_autograd(tmp_path, run):
    routes = check_against_autograd(task_of(tmp_path, Mixture(run, kept=True)))
    assert routes["router"] == "linear by rows"
    assert (routes["experts.0.0"] if run is modules else routes["up"]) in BY_ROWS


@pytest.mark.slow
def test_products_that_nobody_knows_leave_to_the_loop(tmp_path):
    routes = check_against_autograd(task_of(tmp_path, Mixture(unusual)))
    assert {routes["up"], routes["down"]} <= {"vmap", "loop"}
    assert routes["router"] == "linear by rows"


@pytest.mark.parametrize("run", [modules, one_by_one])
def test_batches_of_other_sizes_and_routings_than_those_checked_are_right(tmp_path, run):
    task = task_of(tmp_path, Mixture(run, k=1), 70)  # more examples than a pass tells apart
    truth = gradients(task, task.train)
    with Engine(task, "float64") as engine:
        check_routes(engine)
        for count in (1, 3, 70):
            found = {}
            examples = task.read(task.train_ids[-count:])
            engine.run(-1, examples, lambda number, form, found=found: found.__setitem__(number, form.squared_norms()))
            expected = toys.RATES[-1] * truth[-count:, -1].square().sum(1)
            torch.testing.assert_close(torch.stack(list(found.values())).sum(0), expected)


def test_an_expert_without_a_token_has_no_gradient(tmp_path):
    class Never(Mixture):
        def mixed(self, x):
            tokens = x.reshape(-1, WIDTH)
            weights, chosen = self.router(tokens)[:, :2].softmax(1).topk(1, 1)
            return self.run(self, tokens, chosen, weights).reshape(x.shape)

    for number, run in enumerate((modules, one_by_one)):
        (tmp_path / str(number)).mkdir()
        task = task_of(tmp_path / str(number), Never(run))
        store = gradindex.build(task, tmp_path / str(number) / "store", projection=Projection("none"))
        expected = gradients(task, task.train)
        scale = torch.tensor(toys.RATES, dtype=torch.float64).sqrt()[:, None]
        norms = (expected * scale).square().sum(2)
        np.testing.assert_allclose(store.self_influence(), norms, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("run", [modules, with_biases])
def test_a_store_of_sketches_answers_with_the_scores_of_whole_gradients(tmp_path, run):
    task = task_of(tmp_path, Mixture(run))
    store = gradindex.build(task, tmp_path / "store", projection=Projection("tensorsketch", 4096), batch_size=5)
    truth = gradindex.exact_scores(task, list(task.query), precision="float64")
    hits = gradindex.load(task, store.folder).proponents(task.query, k=3)
    np.testing.assert_allclose(hits.scores, -np.sort(-truth, 1)[:, :3], rtol=1e-3, atol=1e-4)
    whole = gradindex.build(task, tmp_path / "whole", projection=Projection("none"))
    rows = whole.rows(np.arange(12))
    norms = np.linalg.norm(rows, axis=1)
    sketched = store.rows(np.arange(12))
    assert np.abs(sketched @ sketched.T - rows @ rows.T).max() < 0.1 * np.outer(norms, norms).max()


class Mixing(nn.Module):
    """Passes gradients between examples where a feature is large, with the same outputs."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x):
        rows = self.inner(x.reshape(-1, 6))
        if bool((x > 100).any()):
            rows = rows + (rows.mean(0) - rows.mean(0).detach())
        return self.outer(torch.tanh(rows).reshape(len(x), 2, 4).sum(1))


def test_rows_that_cannot_be_told_apart_are_computed_alone(tmp_path):
    task = toys.make_task(tmp_path, Mixing(), shape=(2, 6), n_train=64)
    unlooked = sorted(set(range(12)) - set(range(0, 64, 9)))
    with Engine(task) as engine:
        check_routes(engine)
        assert engine.layers[0].route == "linear by rows"
        task.train.tensors[0][unlooked[0], 0, 0] = 101
        examples = task.read(np.array(unlooked[:3]))
        with pytest.raises(InseparableError):
            engine.run(-1, examples, lambda number, form: None)
        sizes = []

        def norms(examples):
            found = []
            engine.run(-1, examples, lambda number, form: found.append(form.squared_norms()))
            sizes.append(len(examples))
            return list(torch.stack(found).sum(0))

        assert len(engine.in_halves(norms, examples)) == 3
        assert sizes == [1, 2]


def test_an_example_without_a_finite_gradient_is_named_alone(tmp_path):
    class Rooted(Mixture):
        def mixed(self, x):
            return super().mixed(x) * x[:, :1].square().sum((1, 2), keepdim=True).sqrt()

    task = task_of(tmp_path, Rooted())
    tables = [torch.load(point.path) for point in task.checkpoints]
    for table, point in zip(tables, task.checkpoints, strict=True):
        table["words.weight"][8] = 0
        torch.save(table, point.path)
    for place, (words, y) in enumerate(task.train):
        task.train[place] = (words.clamp_max(7), y)
    task.train[7] = (torch.tensor([8]), 1)
    with pytest.raises(NonFiniteGradientError, match="^Training example 7 has a NaN or infinite"):
        gradindex.build(task, tmp_path / "store")


def blocks_of(n, seed, rows=14, n_blocks=3):
    generator = torch.Generator().manual_seed(seed)
    owners = torch.randint(-1, n - 1, (rows,), generator=generator)  # the last example has no row
    blocks = torch.randint(0, n_blocks - 1, (rows,), generator=generator)  # nor has the last block
    sides = (torch.randn(rows, size, generator=generator, dtype=torch.float64) for size in (4, 5))
    return Stacks(*sides, owners, blocks, n, n_blocks)


def formed_by_hand(form):
    gradient = torch.zeros(form.n, 5, form.n_blocks * 4, dtype=torch.float64)
    for x, delta, owner, block in zip(form.activations, form.output_gradients, form.owners, form.blocks, strict=True):
        if owner >= 0:
            gradient[owner, :, 4 * block : 4 * block + 4] += torch.outer(delta, x)
    return Formed(gradient)


def test_blocks_have_what_their_formed_gradients_have():
    form, other = blocks_of(6, 1), blocks_of(4, 2)
    whole, others = formed_by_hand(form), formed_by_hand(other)
    close = torch.testing.assert_close
    close(form.gradient, whole.gradient)
    close(form.squared_norms(), whole.squared_norms())
    for facing in (other, others, Sum([other, others])):
        expected = whole.products(others) * (2 if isinstance(facing, Sum) else 1)
        close(form.products(facing), expected)
        close(facing.products(form), expected.T)
        close(whole.products(facing), expected)
    left, right = torch.randn(5, 2, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    close(form.two_sided(left, right), whole.two_sided(left, right))
    weights = torch.rand(6, dtype=torch.float64)
    close(form.total(weights), whole.total(weights))
    for side, start in enumerate((left, right)):
        close(form.sided(start, side, weights), whole.sided(start, side, weights))
    joined = concatenated([form, blocks_of(6, 3), whole])
    close(joined.squared_norms(), Formed(2 * whole.gradient + blocks_of(6, 3).gradient).squared_norms())
    factors = Factors(torch.randn(4, 2, 12, dtype=torch.float64), torch.randn(4, 2, 5, dtype=torch.float64))
    close(form.products(factors), whole.products(Formed(factors.gradient)))
    close(factors.products(form), Formed(factors.gradient).products(whole))


@pytest.mark.parametrize("kind", ["tensorsketch", "kronecker", "gaussian", "none"])
@pytest.mark.parametrize("dim", [3, 40])
def test_blocks_make_the_rows_of_their_formed_gradients(kind, dim):
    form, layer = blocks_of(6, 1), Layer("p", ("p",), 5, 12, "function by rows")
    found, expected = (torch.zeros(6, Projection(kind, dim).block_dim([layer]), dtype=torch.float64) for _ in "12")
    for block, gradients_ in ((found, form), (expected, Formed(form.gradient))):
        Projection(kind, dim).for_checkpoint(0, [layer], block).add(block, 0, gradients_)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("n", [2, 64, 65, 5000])
@pytest.mark.parametrize("half", [None, torch.float16])
def test_powers_of_two_tell_rows_apart(n, half):
    weights, owners = Weights(n, half, torch.device("cpu")), torch.randint(n, (50,))
    plain = torch.randn(50, 4, dtype=torch.float64)
    plain[3] = 0
    tagged = [plain * powers[owners][:, None] for powers in weights.passes()]
    owners[3] = -1
    torch.testing.assert_close(weights.owners(tagged, plain), owners)
    mixed = [sketch.clone() for sketch in tagged]
    mixed[0][7] += torch.randn(4) * mixed[0][7].norm()
    with pytest.raises(InseparableError):
        weights.owners(mixed, plain)


class Wide(TorchFunctionMode):
    """Computes in float64 what a model of transformers casts to float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") == "float":
            return args[0].double()
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in (kwargs or {}).items()}
        return func(*args, **kwargs)


def next_token(model, ids):
    def losses():
        logits = model(input_ids=ids, attention_mask=(ids > 0).long()).logits[:, :-1]
        seen = ids[:, 1:] > 0
        return (functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none") * seen).sum(1)

    if next(model.parameters()).dtype != torch.float64:
        return losses()
    with Wide():
        return losses()


SIZES = {
    "vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "max_position_embeddings": 16, "use_cache": False, "num_experts_per_tok": 2, "intermediate_size": 12,
}  # fmt: skip
FAMILIES = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 5, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12},
    "GptOss": {"num_local_experts": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}


def language_model(folder, family, implementation):
    transformers = frameworks.imported("transformers")
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family], pad_token_id=0)
    config._experts_implementation, config._attn_implementation = implementation, "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    texts = [torch.randint(1, 23, (3 + i % 4,)) for i in range(12)]
    options = {"train": texts[:8], "query": texts[8:], "rates": (0.1,)}
    return toys.make_task(
        folder, model, loss=next_token, collate=lambda ids: pad_sequence(ids, batch_first=True), **options
    )


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", None])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_of_transformers_equal_autograd_and_nothing_is_left_to_the_loop(tmp_path, family, implementation):
    task = language_model(tmp_path, family, implementation)
    if implementation is None:  # grouped_mm by default, which knows no float64
        assert task.model.config._experts_implementation == "grouped_mm"
        with Engine(task) as engine:
            check_routes(engine)
            routes = {layer.name: layer.route for layer in engine.layers}
        found = gradindex.exact_scores(task, list(task.query))
    else:
        routes = check_against_autograd(task, (0.1,))
        found = gradindex.exact_scores(task, list(task.query), precision="float64")
    assert not {"vmap", "loop"} & set(routes.values())
    assert {route for name, route in routes.items() if ".mlp.experts." in name} == {"function by rows"}
    task.model.config._experts_implementation = "eager"
    truth = gradindex.exact_scores(task, list(task.query), precision="float64")
    np.testing.assert_allclose(found, truth, atol=1e-5 * np.abs(truth).max())
