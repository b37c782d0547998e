"""California housing: influence on a regression, with Adam's steps modelled or not.

A network of three hidden layers predicts a district's median house value from the census of 1990. Proponents
and opponents of chosen districts are drawn on a map, and so are the districts of high self-influence. The
network is trained with Adam, so TracInCP is computed in its plain form and with Adam's second moments
(remark 3.4), and during the training both first-order forms are compared with the true change of test
districts' losses.

python scripts/paper/housing.py [--quick] [--json] [--data DIR] [--save FILE]
"""

from __future__ import annotations

import csv
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import OPPONENT, PROPONENT, Experiment, losses_and_slopes, pearson, spearman
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gradindex
from gradindex import Hits, Recorder, Task, find_checkpoints
from gradindex.checkpoint import evenly

EPOCHS, BATCH, LEARNING_RATE, SEED, HIDDEN = 60, 128, 1e-3, 0, 64
N_CHECKPOINTS, N_QUERY, K = 5, 100, 20
COUNTED = ("total_rooms", "total_bedrooms", "population", "households", "median_income")
VALUE, CAP = "median_house_value", 500_001.0  # the census wrote all values above half a million as this one


@dataclass(frozen=True)
class Districts:
    """The table as a network takes it.

    Args:
        columns: by name (n,), as in the file, missing bedrooms filled with the median.
        near: (n,) the category of ``ocean_proximity``.
        features: (n, m) float32, standardised.
        targets: (n,) float32, the value in units of 100,000 dollars.
    """

    columns: dict[str, NDArray[np.float64]]
    near: NDArray[np.str_]
    features: Tensor
    targets: Tensor


def read(path: Path) -> Districts:
    """Read the file; counts and incomes, which are heavy-tailed, are used by their logarithm."""
    if not path.is_file():
        raise SystemExit(
            f"{path} does not exist. Give --data, or set GRADINDEX_DATA to the folder that holds {path.name}."
        )
    with path.open(newline="") as file:
        records = list(csv.DictReader(file))
    near = np.array([record.pop("ocean_proximity") for record in records])
    columns = {name: np.array([float(record[name] or "nan") for record in records]) for name in records[0]}
    bedrooms = columns["total_bedrooms"]
    columns["total_bedrooms"] = np.where(np.isnan(bedrooms), np.nanmedian(bedrooms), bedrooms)
    numbers = [np.log1p(values) if name in COUNTED else values for name, values in columns.items() if name != VALUE]
    numbers += [(near == kind).astype(float) for kind in np.unique(near)]
    table = np.stack(numbers, 1)
    table = (table - table.mean(0)) / table.std(0)
    return Districts(columns, near, torch.from_numpy(table).float(), torch.from_numpy(columns[VALUE] / 1e5).float())


def make_model(inputs: int) -> nn.Module:
    """Three hidden layers."""
    layers: list[nn.Module] = []
    for size in (inputs, HIDDEN, HIDDEN):
        layers += [nn.Linear(size, HIDDEN), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(HIDDEN, 1), nn.Flatten(0))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Squared error of each district."""
    features, targets = batch
    return (model(features) - targets).square()


class FirstOrder:
    """What each step is expected to do to the losses of test districts, and what it does.

    Three forms, with g the batch's gradient, D = 1 / (sqrt(v) + epsilon) and m Adam's running mean of g:
    ``plain``, eta <grad l(w; z'), g>; ``adam``, eta <grad l(w; z'), D g> (remark 3.4 of the paper, what
    ``preconditioner="adam"`` weighs by); ``adam with momentum``, eta <grad l(w; z'), D m>, the step itself.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Adam, queries: tuple[Tensor, Tensor]) -> None:
        self._model, self._optimizer, self._queries = model, optimizer, queries
        self._forms: dict[str, list[NDArray[Any]]] = {"plain": [], "adam": [], "adam with momentum": []}
        self._losses: list[NDArray[Any]] = []

    def before_step(self) -> None:
        """Read the gradients and the optimizer's state."""
        plain, adam, momentum = {}, {}, {}
        for name, parameter in self._model.named_parameters():
            assert parameter.grad is not None
            plain[name] = parameter.grad
            weight, mean = self._after(parameter, parameter.grad)
            adam[name], momentum[name] = weight * parameter.grad, weight * mean
        for form, direction in zip(self._forms.values(), (plain, adam, momentum), strict=True):
            now, along = losses_and_slopes(self._model, loss, self._queries, direction)
            form.append(LEARNING_RATE * along)
        self._losses.append(now)

    def _after(self, parameter: nn.Parameter, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """D and the bias-corrected m as the coming step will use them."""
        state, options = self._optimizer.state.get(parameter, {}), self._optimizer.defaults
        number = float(state.get("step", 0)) + 1
        moments = []
        for beta, key, term in zip(
            options["betas"], ("exp_avg", "exp_avg_sq"), (gradient, gradient.square()), strict=True
        ):
            before = state.get(key, torch.zeros_like(gradient))
            moments.append((beta * before + (1 - beta) * term) / (1 - beta**number))
        return 1 / (moments[1].sqrt() + options["eps"]), moments[0]

    def correlations(self, spans: int | None = None) -> dict[str, NDArray[np.float64]]:
        """(n_query,) Pearson of each form with the true fall, over the steps or over sums of equal spans of steps."""
        losses = np.array(self._losses)
        true = losses[:-1] - losses[1:]

        def summed(values: NDArray[np.float64]) -> NDArray[np.float64]:
            parts = values if spans is None else [part.sum(0) for part in np.array_split(values, spans)]
            return np.asarray(parts).T

        return {name: pearson(summed(np.array(values[:-1])), summed(true)) for name, values in self._forms.items()}


def train(
    model: nn.Module, data: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor], epochs: int, folder: Path
) -> FirstOrder:
    """Train with Adam and record a checkpoint each epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    recorder, first_order = (
        Recorder(model, optimizer, folder, second_moments=True),
        FirstOrder(model, optimizer, queries),
    )
    for epoch in range(1, epochs + 1):
        losses = []
        for rows in torch.randperm(len(data[1])).split(BATCH):
            optimizer.zero_grad()
            mean = loss(model, (data[0][rows], data[1][rows])).mean()
            mean.backward()
            first_order.before_step()
            optimizer.step()
            losses.append(mean.detach())
        recorder.save(float(torch.stack(losses).mean()))
        print(f"epoch {epoch} of {epochs}: training loss {torch.stack(losses).mean():.3f}", file=sys.stderr, flush=True)
    return first_order


def main() -> None:
    """Measure, print and draw."""
    experiment = Experiment("California housing: influence on a regression", __doc__)
    import reference

    epochs, n_checkpoints = (4, 2) if experiment.quick else (EPOCHS, N_CHECKPOINTS)
    districts = read(reference.data_file("california_housing.csv"))
    n = len(districts.targets)
    order = np.random.default_rng(SEED).permutation(n)
    train_rows, test_rows = np.sort(order[: n * 4 // 5]), np.sort(order[n * 4 // 5 :])
    if experiment.quick:
        train_rows = train_rows[::4]
    train_set, test_set = ((districts.features[rows], districts.targets[rows]) for rows in (train_rows, test_rows))
    torch.manual_seed(SEED)
    model = make_model(districts.features.shape[1])
    with tempfile.TemporaryDirectory() as folder:
        every = np.linspace(0, len(test_rows) - 1, N_QUERY).astype(int)
        first_order = train(model, train_set, (test_set[0][every], test_set[1][every]), epochs, Path(folder))
        with torch.no_grad():
            predicted = model(test_set[0])
        residuals = (test_set[1] - predicted).numpy()
        explained = 1 - residuals.var() / test_set[1].numpy().var()
        experiment.bar("explained variance of the test districts", explained, "", 0.4 if experiment.quick else 0.65)
        for unit, correlations in (("steps", first_order.correlations()), ("epochs", first_order.correlations(epochs))):
            for form, values in correlations.items():
                name = f"first-order form ({form}) and true change of a test district over {unit}: mean Pearson"
                experiment.figure(name, values.mean(), "")

        queries = chosen(districts, test_rows, predicted.numpy())
        rows = list(queries.values())
        task = Task(
            name="California housing",
            model=make_model(districts.features.shape[1]),
            loss=loss,
            train=TensorDataset(*train_set),
            query=TensorDataset(*(part[rows] for part in test_set)),
            checkpoints=evenly(find_checkpoints(folder), n_checkpoints),
            columns={VALUE: districts.columns[VALUE][train_rows], "near": districts.near[train_rows]},
        )
        influence(experiment, task, Path(folder), districts, (train_rows, test_rows), queries, predicted.numpy())
    experiment.finish()


def chosen(districts: Districts, test_rows: NDArray[np.int64], predicted: NDArray[np.float32]) -> dict[str, int]:
    """By description, positions among the test districts: well predicted ones of three places, and the worst."""
    place = {
        "San Francisco": (-122.44, 37.76),
        "Los Angeles": (-118.30, 34.05),
        "Fresno": (-119.79, 36.74),
    }
    longitude, latitude = (districts.columns[name][test_rows] for name in ("longitude", "latitude"))
    found = {
        f"{name}": int(np.argmin(np.square(longitude - x) + np.square(latitude - y))) for name, (x, y) in place.items()
    }
    errors = np.abs(predicted - districts.targets.numpy()[test_rows])
    return found | {"largest error": int(errors.argmax())}


def influence(
    experiment: Experiment,
    task: Task,
    folder: Path,
    districts: Districts,
    rows: tuple[NDArray[np.int64], NDArray[np.int64]],
    queries: dict[str, int],
    predicted: NDArray[np.float32],
) -> None:
    """Proponents, opponents and self-influence by both forms."""
    train_rows, test_rows = rows
    answers: dict[str, list[Hits]] = {}
    own, scores = {}, {}
    for form, preconditioner in (("plain", None), ("adam", "adam")):
        here = replace(task, preconditioner=preconditioner)
        store = gradindex.build(here, folder / form)
        retriever = gradindex.load(here, folder / form)
        positions = range(len(queries))
        answers[form] = [retriever.proponents(positions, k=K), retriever.opponents(positions, k=K)]
        own[form], scores[form] = store.self_influence().sum(1), retriever.exact_scores(positions)
    for name, number in zip(queries, range(len(queries)), strict=True):
        value = spearman(scores["plain"][number], scores["adam"][number])
        experiment.figure(f"{name}: Spearman of plain and Adam scores", float(value), "")
        for which, kind in enumerate(("proponents", "opponents")):
            shared = np.intersect1d(answers["plain"][which].ids[number], answers["adam"][which].ids[number]).size / K
            experiment.figure(f"{name}: share of the top {K} {kind} in both", shared, "")
    experiment.figure("self-influence: Spearman of plain and Adam", float(spearman(own["plain"], own["adam"])), "")
    for form, values in own.items():
        heavy = np.argsort(-values)[: max(1, len(values) // 100)]
        capped = districts.columns[VALUE][train_rows] >= CAP
        experiment.figure(
            f"values at the census's cap among the 1% of highest self-influence ({form})", capped[heavy].mean(), "share"
        )
    experiment.figure("values at the census's cap among all training districts", capped.mean(), "share")

    def described(row: int) -> dict[str, Any]:
        names = ("longitude", "latitude", "median_income", "housing_median_age", "population", VALUE)
        return {name: round(float(districts.columns[name][row]), 2) for name in names} | {
            "near": str(districts.near[row])
        }

    experiment.keep(
        "queries",
        [
            {"query": name, **described(test_rows[at]), "predicted": round(float(predicted[at]) * 1e5)}
            for name, at in queries.items()
        ],
    )
    best = {form: [record for hits in both for record in hits.records()] for form, both in answers.items()}
    experiment.keep(
        "first three proponents and opponents",
        {
            form: [record | described(train_rows[record["id"]]) for record in records if record["rank"] <= 3]
            for form, records in best.items()
        },
    )
    heaviest = {form: np.argsort(-values)[:10] for form, values in own.items()}
    experiment.keep(
        "highest self-influence",
        {
            form: [{"self_influence": float(own[form][i]), **described(train_rows[i])} for i in ids]
            for form, ids in heaviest.items()
        },
    )
    map_of = Map(districts, train_rows, test_rows)
    experiment.draw(map_of.answers(queries, *answers["adam"]), "-map.png")
    experiment.draw(map_of.self_influence(own), "-self-influence.png")


@dataclass(frozen=True)
class Map:
    """Draws districts where they lie."""

    districts: Districts
    train_rows: NDArray[np.int64]
    test_rows: NDArray[np.int64]

    def answers(self, queries: dict[str, int], proponents: Hits, opponents: Hits) -> Figure:
        """One panel for each query, around the nine tenths of the hits that are nearest to it."""
        picture = Figure(figsize=(11, 10), layout="constrained")
        panels = picture.subplots(2, -(-len(queries) // 2)).flat
        for number, (axes, (name, at)) in enumerate(zip(panels, queries.items(), strict=True)):
            self._ground(axes, 5)
            axes.locator_params(nbins=5)
            center = np.concatenate(self._where(self.test_rows[[at]]))
            places = []
            for hits, colour, marker in ((opponents, OPPONENT, "v"), (proponents, PROPONENT, "^")):
                x, y = self._where(self.train_rows[hits.ids[number]])
                axes.scatter(x, y, s=70, c=colour, marker=marker, label=hits.kind, edgecolors="white", linewidths=0.6)
                places.append(np.maximum(np.abs(x - center[0]) / 1.25, np.abs(y - center[1])))
            axes.scatter(*center, s=260, c="#f2c14e", marker="*", label="query", edgecolors="black", linewidths=0.8)
            reach = max(0.15, 1.1 * float(np.quantile(np.concatenate(places), 0.9)))
            outside = int((np.concatenate(places) > reach).sum())
            value = self.districts.columns[VALUE][self.test_rows[at]]
            axes.set_title(f"{name}: ${value:,.0f}" + (f" ({outside} farther away)" if outside else ""))
            wide = 1.25 * reach  # a degree of longitude is shorter here than one of latitude
            axes.set(
                xlim=(center[0] - wide, center[0] + wide), ylim=(center[1] - reach, center[1] + reach), aspect=1.25
            )
        axes.legend(loc="upper right", framealpha=0.9)
        return picture

    def self_influence(self, own: dict[str, NDArray[np.float64]]) -> Figure:
        """By each form, the 1% of highest self-influence, by size, and their values."""
        picture = Figure(figsize=(11, 5.6), layout="constrained")
        panels = picture.subplots(1, len(own), sharey=True)
        for axes, (form, values) in zip(panels, own.items(), strict=True):
            self._ground(axes, 1)
            heavy = np.argsort(-values)[: max(1, len(values) // 100)]
            x, y = self._where(self.train_rows[heavy])
            prices = self.districts.columns[VALUE][self.train_rows[heavy]] / 1e3
            size = 12 + 140 * values[heavy] / values[heavy].max()
            points = axes.scatter(
                x, y, s=size, c=prices, cmap="viridis", alpha=0.85, edgecolors="white", linewidths=0.5
            )
            axes.set_title(f"{form}: the {len(heavy)} of highest self-influence")
            axes.set_aspect(1.25)
            axes.label_outer()
        picture.colorbar(points, ax=panels, label="median house value, thousand dollars", shrink=0.8)
        return picture

    def _ground(self, axes: Axes, size: float) -> None:
        axes.scatter(*self._where(self.train_rows), s=size, c="0.85", rasterized=True)
        axes.set(xlabel="longitude", ylabel="latitude")

    def _where(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return self.districts.columns["longitude"][rows], self.districts.columns["latitude"][rows]


if __name__ == "__main__":
    main()
