r"""How the gradients of ImageNet's shape compare with those of real softmax layers with many outputs.

The gradient of such a layer is delta [x, 1]^T, delta = p - onehot(y). What an index, packed factors and the estimate by
the largest entries of delta gain depends on how few entries of delta are large, how much norms differ, and how parallel
features are; here are these figures of scripts/tasks/imagenet_shape.py and of every real layer whose data are at hand
(heads.py). Then what they lead to: how many of the true top-100 proponents and opponents, by exact TracInCP at all
three checkpoints, are among the best by the estimate

    sum_c eta_c (delta_c . delta'_c) ||[x_c, 1]|| ||[x'_c, 1]||

of :func:`gradindex.retrieval.leading.leading`, where delta keeps its largest entries and is made as long again.

    python scripts/bench/shape.py [--quick] [--json] [--save FILE] [--tasks imagenet_shape mnist ...]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import Bench
from heads import FULL, HEADS, QUICK, Head
from numpy.typing import NDArray

from gradindex.store import PACKING_SAMPLE, packing_of
from gradindex.store.packing import fine

SAMPLE, ASKED, TOP, BEST = 2000, 50, 100, (150, 300)
QUICK_ASKED, QUICK_TOP, QUICK_BEST = 10, 20, (30, 60)
LARGE, SHARES, MILLIONTH, PERCENTILES = (0.01, 0.05), (4, 16, 64), 1e-6, (90, 99)
KEPT = 32  # largest entries that the estimate takes where packed factors keep none
Array = NDArray[np.float32]


class Sides(NamedTuple):
    """Gradients of a layer as its factors.

    Args:
        x: (n, d) float32, with the 1 of the bias.
        delta: (n, classes) float32.
    """

    x: Array
    delta: Array

    @classmethod
    def of(cls, features: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Sides:
        """Those of cross-entropy for features (n, d) with labels (n,)."""
        delta = torch.nn.functional.linear(features, weight, bias).softmax(1)
        delta[torch.arange(len(labels)), labels] -= 1
        return cls(torch.nn.functional.pad(features, (0, 1), value=1.0).numpy(), delta.numpy())

    @property
    def norms(self) -> Array:
        """(n,) of the gradients."""
        norms: Array = np.linalg.norm(self.x, axis=1) * np.linalg.norm(self.delta, axis=1)
        return norms


def statistics(sides: Sides, labels: NDArray[np.int64]) -> dict[str, float]:
    """What the table has of one checkpoint.

    Args:
        sides: of the rows.
        labels: (n,) by which rows are of the same class.
    """
    sizes = np.sort(np.abs(sides.delta.astype(np.float64)), axis=1)[:, ::-1]
    squares = sizes**2
    total = squares.sum(1, keepdims=True)
    held = np.cumsum(squares, axis=1) / total
    # Summed from the small end, so that they are not lost in what is already there.
    left = np.cumsum(squares[:, ::-1], axis=1)[:, ::-1]
    found = {f"entries above {size}": float((sizes > size).sum(1).mean()) for size in LARGE}
    found |= {f"in the largest {count}": float(held[:, min(count, held.shape[1]) - 1].mean()) for count in SHARES}
    found["needed for 1e-6"] = float((left > MILLIONTH**2 * total).mean())
    norms = sides.norms
    for percentile in PERCENTILES:
        found[f"norm, {percentile}th percentile"] = float(np.percentile(norms, percentile) / np.median(norms))
    found["cosine of x, same class"], found["cosine of x, other classes"] = cosines(sides.x, labels)
    return found


def cosines(x: Array, labels: NDArray[np.int64]) -> tuple[float, float]:
    """Mean over all pairs of two rows x (n, d) of the same class, and of two classes; NaN where there is no pair."""
    units = x.astype(np.float64)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    _, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), units.shape[1]))
    np.add.at(sums, numbers, units)
    # The sum over all pairs of a set is the squared length of its sum; each row with itself is 1.
    within, n_within = float((sums**2).sum()), int((counts**2).sum())
    every, n_every = float((sums.sum(0) ** 2).sum()), len(x) ** 2
    same, other = n_within - len(x), n_every - n_within
    return (within - len(x)) / same if same else np.nan, (every - within) / other if other else np.nan


def correlation(delta: Array, before: Array) -> float:
    """Mean over rows of the correlation of two checkpoints' delta (n, classes); both have mean 0."""
    products = np.einsum("nc,nc->n", delta, before, dtype=np.float64)
    lengths = np.linalg.norm(delta.astype(np.float64), axis=1) * np.linalg.norm(before.astype(np.float64), axis=1)
    return float((products / lengths).mean())


def estimated(sides: Sides, asked: Sides, kept: int) -> Array:
    """(n_query, n) the inner products of the gradients, by the largest entries of rows' delta, and x as if parallel."""
    places = np.argpartition(np.abs(sides.delta), -kept, axis=1)[:, -kept:]
    leading = np.zeros_like(sides.delta)
    np.put_along_axis(leading, places, np.take_along_axis(sides.delta, places, 1), 1)
    leading *= (sides.norms / np.linalg.norm(leading, axis=1))[:, None]
    of_queries = asked.delta * np.linalg.norm(asked.x, axis=1, keepdims=True)
    products: Array = of_queries @ leading.T
    return products


def recall(scores: Array, estimates: Array, top: int, best: int) -> float:
    """Share of the ``top`` largest scores (n_query, n) that are among the ``best`` largest estimates."""
    true, found = (np.argpartition(-a, count - 1, axis=1)[:, :count] for a, count in ((scores, top), (estimates, best)))
    return float(np.mean([np.isin(wanted, had).mean() for wanted, had in zip(true, found, strict=True)]))


class Looked(NamedTuple):
    """What there is to say of a layer.

    Args:
        checkpoints: statistics of each.
        whole: of the layer.
    """

    checkpoints: list[dict[str, float]]
    whole: dict[str, float | int | str]


def look(head: Head, quick: bool) -> Looked:
    """Everything about a layer, by a sample of its rows; the recall by all rows that were read."""
    n_asked, top, best = (QUICK_ASKED, QUICK_TOP, QUICK_BEST) if quick else (ASKED, TOP, BEST)
    labels, few = head.labels.numpy(), slice(0, SAMPLE)
    found, factors = [], {}
    all_sides, asked, right = [], [], 0.0
    for number, load in enumerate(head.seen):
        seen = load()
        all_sides.append(Sides.of(seen.features, head.labels, seen.weight, seen.bias))
        asked.append(Sides.of(seen.query_features[:n_asked], head.query_labels[:n_asked], seen.weight, seen.bias))
        answers = torch.nn.functional.linear(seen.query_features, seen.weight, seen.bias).argmax(1)
        right = float((answers == head.query_labels).float().mean())
        sample = Sides(*(side[few] for side in all_sides[-1]))
        found.append(statistics(sample, labels[few]))
        if number:
            found[-1]["correlation with the one before"] = correlation(sample.delta, all_sides[-2].delta[few])
        factors[number, 0] = (sample.x[:PACKING_SAMPLE], sample.delta[:PACKING_SAMPLE])
    d, classes = all_sides[0].x.shape[1], all_sides[0].delta.shape[1]
    whole_bytes = 4 * (d + classes) * len(all_sides)
    whole: dict[str, float | int | str] = {
        "rows": len(labels),
        "classes": classes,
        "features": d - 1,
        "right": right,
        "KiB a row, whole": whole_bytes / 1024,
    }
    packing = packing_of(factors, "float32").get(0)
    kept = (packing[1].kept if packing else 0) or min(KEPT, classes // 8)
    if packing:
        ways = [f"{way.kept} and {way.bits} bits" for way in packing]
        room = len(all_sides) * sum(way.row_bytes(size) for way, size in zip(packing, (d, classes), strict=True))
        errors = [
            [way.errors(side, way.packed(side)) for way, side in zip(packing, sides, strict=True)]
            for sides in factors.values()
        ]
        stays = 1 - float(np.mean([fine(x_errors, delta_errors, "float32") for x_errors, delta_errors in errors]))
        whole |= {"packed, x": ways[0], "packed, delta": ways[1], "KiB a row, packed": room / 1024, "too rough": stays}
    else:
        whole |= {"packed, x": "no", "packed, delta": "no", "KiB a row, packed": "", "too rough": ""}
    whole["entries in the estimate"] = kept
    scores, estimates = (
        sum(rate * of(s, q) for rate, s, q in zip(head.rates, all_sides, asked, strict=True))
        for of in (lambda s, q: (q.delta @ s.delta.T) * (q.x @ s.x.T), lambda s, q: estimated(s, q, kept))
    )
    for sign, what in ((1, "proponents"), (-1, "opponents")):
        for count in best:
            whole[f"{what}, best {count}"] = recall(sign * scores, sign * estimates, top, count)
    return Looked(found, whole)


# A figure, and whether a higher one makes the work of lists, packing or the estimate easier; what depends on it.
READINGS = (
    ("entries above 0.01", False, "copies of a row in lists by output"),
    ("in the largest 4", True, "lists by output"),
    ("in the largest 64", True, "the estimate"),
    ("needed for 1e-6", False, "packed factors"),
    ("norm, 99th percentile", False, "lists, graphs"),
    ("cosine of x, same class", True, "the estimate of proponents"),
    ("cosine of x, other classes", True, "the estimate of opponents"),
    ("correlation with the one before", True, "one order for all checkpoints"),
    ("right", True, "all of them"),
    ("proponents, best {best}", True, "how many proposals are scored"),
    ("opponents, best {best}", True, "how many proposals are scored"),
)

# What holds whatever the figures are, and what it means for them.
LIMITS = (
    ("no ImageNet network is at hand; the real ones are small and trained for minutes",
     "a real ImageNet layer may lie outside all of these"),
    ("the classes of MNIST and CIFAR-10 are clusters by k-means",
     "neighbours share a border, so more outputs may be confused than between classes that people named"),
    ("some 20 rows of a class are looked at, of a word 5; ImageNet has 1,281",
     "a top-100 spans several classes, as it would not with all rows"),
    ("a row of the language model is one place of a text",
     "a whole text's gradient is a sum over places, and has neither one x nor one delta"),
)  # fmt: skip


def compare(made: dict[str, Any], real: Sequence[dict[str, Any]], best: int) -> list[dict[str, float | str]]:
    """Where the made layer lies among the real ones, at the last checkpoint, and what that means.

    Args:
        made: its figures.
        real: those of each of the others.
        best: how many by the estimate.
    """
    rows: list[dict[str, float | str]] = []
    for template, easier, decides in READINGS:
        name = template.format(best=best)
        least, most = min(each[name] for each in real), max(each[name] for each in real)
        value, verdict = made[name], "among the real ones"
        if not least <= value <= most:
            verdict = "easier than every real one" if (value > most) == easier else "harder than every real one"
        figures: dict[str, float | str] = {"figure": name, "ImageNet's shape": value, "real, least": least}
        rows.append(figures | {"real, most": most, "ImageNet's shape is": verdict, "matters for": decides})
    return rows


def main() -> None:
    """Look and print."""
    bench = Bench("ImageNet's shape beside real layers", __doc__, parts={"tasks": list(HEADS)})
    last: dict[str, dict[str, Any]] = {}
    looked: dict[str, Looked] = {}
    for task in bench.options.tasks:
        try:
            head = HEADS[task](QUICK if bench.quick else FULL)
        except FileNotFoundError as error:
            print(f"{task}: left out, for {error}", file=sys.stderr, flush=True)
            continue
        looked[head.name] = look(head, bench.quick)
        last[task] = {**looked[head.name].checkpoints[-1], **looked[head.name].whole}
        for number, values in enumerate(looked[head.name].checkpoints, start=1):
            first = {} if "correlation with the one before" in values else {"correlation with the one before": ""}
            bench.row("Each checkpoint", {"layer": head.name, "checkpoint": number, **values, **first})
        del head
    for name, (_, whole) in looked.items():
        bench.row("All checkpoints together", {"layer": name, **whole})
    made = last.pop("imagenet_shape", None)
    if made and last:
        for row in compare(made, list(last.values()), (QUICK_BEST if bench.quick else BEST)[0]):
            bench.row("ImageNet's shape among them, at the last checkpoint", row)
    for limit, meaning in LIMITS:
        bench.row("What these figures leave open", {"limit": limit, "what it means": meaning})
    bench.finish()


if __name__ == "__main__":
    main()
