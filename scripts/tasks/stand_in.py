"""Small stand-ins for the archives, made from the digits that come with gradindex: what ``--quick`` runs on."""

from __future__ import annotations

import csv
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGITS = Path(__file__).resolve().parents[2] / "data" / "digits.npz"
N_TRAIN, N_TEST = {"mnist": 6000, "cifar10": 1000}, 1000
SIDE = {"mnist": 28, "cifar10": 32}
N_DISTRICTS, N_TEXTS = 4000, 1600


@cache
def images(name: str) -> dict[str, NDArray[Any]]:
    """The arrays of ``reference.image_archive``: digits, three times as large, each somewhere in its picture.

    For ``"cifar10"`` they are coloured. Test pictures are of digits that no training picture shows.
    """
    with np.load(DIGITS) as archive:
        digits, labels = archive["images"].astype(np.float64) / 16, archive["labels"].astype(np.int64)
    generator = np.random.default_rng(0)
    order = generator.permutation(len(digits))
    arrays: dict[str, NDArray[Any]] = {"classes": np.array([str(number) for number in range(10)])}
    for part, sources, count in (("train", order[:1400], N_TRAIN[name]), ("test", order[1400:], N_TEST)):
        chosen = generator.permutation(np.resize(sources, count))
        chosen = chosen[np.argsort(labels[chosen], kind="stable")]  # the archives are ordered by class
        grey = _placed(digits[chosen], SIDE[name], generator)
        if name == "cifar10":
            grey = _coloured(grey, generator)
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = (grey * 255).round().astype(np.uint8), labels[chosen]
    return arrays


def _placed(digits: NDArray[Any], side: int, generator: np.random.Generator) -> NDArray[Any]:
    """(n, side, side) with each digit (8, 8) at three times its size, somewhere."""
    large = digits.repeat(3, 1).repeat(3, 2)
    placed = np.zeros((len(digits), side, side))
    corners = generator.integers(0, side - 24 + 1, (len(digits), 2))
    for picture, digit, (top, left) in zip(placed, large, corners.tolist(), strict=True):
        picture[top : top + 24, left : left + 24] = digit
    return placed


def _coloured(grey: NDArray[Any], generator: np.random.Generator) -> NDArray[Any]:
    """(n, h, w, 3): a bright colour on a dark one, and some noise."""
    bright, dark = (generator.uniform(*span, (len(grey), 1, 1, 3)) for span in ((0.5, 0.9), (0.1, 0.4)))
    shade = grey[..., None]
    return np.clip(shade * bright + (1 - shade) * dark + generator.normal(0, 0.03, (*grey.shape, 3)), 0, 1)


def california_housing(path: Path) -> None:
    """Districts whose value follows income, the sea and the two large cities, with noise; capped as the census did."""
    generator = np.random.default_rng(1)
    n = N_DISTRICTS
    along = generator.random(n)
    inland = generator.exponential(0.8, n)
    longitude, latitude = -124.2 + 7.5 * along + inland, 41.8 - 9.0 * along + 0.5 * inland
    income = generator.lognormal(1.2, 0.45, n)
    households = np.ceil(generator.lognormal(6.0, 0.7, n))
    age = generator.integers(1, 53, n)
    near = np.minimum(np.hypot(longitude + 122.44, latitude - 37.76), np.hypot(longitude + 118.30, latitude - 34.05))
    value = 40_000 + 38_000 * income + 90_000 * np.exp(-near) + 60_000 * np.exp(-2 * inland)
    value = np.clip(value * generator.lognormal(0, 0.15, n), 15_000, 500_001)
    kind = np.where(inland < 0.15, "NEAR OCEAN", np.where(inland < 0.6, "<1H OCEAN", "INLAND"))
    rooms = np.ceil(households * generator.normal(5.3, 0.6, n).clip(2))
    bedrooms = [f"{value:.1f}" if i % 100 else "" for i, value in enumerate(np.ceil(rooms / 5))]
    people = np.ceil(households * generator.normal(2.9, 0.4, n).clip(1))
    names = (
        "longitude", "latitude", "housing_median_age", "total_rooms", "total_bedrooms", "population", "households",
        "median_income", "median_house_value", "ocean_proximity",
    )  # fmt: skip
    columns = (longitude, latitude, age, rooms, bedrooms, people, households, income, value.round(), kind)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(zip(*columns, strict=True))


TOPICS = (
    "minister election border treaty president troops embassy parliament rebels summit protest vote",
    "coach season goal league striker tournament medal innings champion stadium playoff injury",
    "shares profit quarter market oil dollar investors merger bank earnings prices stocks",
    "software chip scientists browser satellite internet computer virus researchers server space phone",
)
COMMON = "the a new after over says as for on with more from its first will two year week today before"


def ag_news_7600(path: Path) -> None:
    """Class (from 1), title, text: words of a topic among words of all, some of them of another topic."""
    generator = np.random.default_rng(2)
    topics, common = [topic.split() for topic in TOPICS], COMMON.split()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("class", "title", "text"))
        for _ in range(N_TEXTS):
            label = int(generator.integers(len(topics)))

            def words(count: int, label: int = label) -> str:
                other = int(generator.integers(len(topics)))
                pools = (topics[label], common, topics[other])
                picked = (pools[pool] for pool in generator.choice(3, count, p=(0.45, 0.45, 0.1)))
                return " ".join(str(generator.choice(pool)) for pool in picked)

            writer.writerow((label + 1, words(6).capitalize(), f"{words(18).capitalize()}."))
