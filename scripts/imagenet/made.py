"""A small image folder and checkpoints, to try the scripts on: ``--quick``, and the tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from resnet import ResNet, resnet14

WIDTH = 8
RATES = (0.1, 0.01, 0.001)


def synset(number: int) -> str:
    """The name of a class."""
    return f"n{number:08d}"


def picture(seed: int, size: tuple[int, int] = (56, 40)) -> Image.Image:
    """Noise over a colour."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 60, (size[1], size[0], 3)) + generator.integers(0, 190, 3)
    return Image.fromarray(pixels.astype(np.uint8))


def make_folder(root: Path, counts: Sequence[int], val: int = 3) -> Path:
    """ILSVRC's layout with as many pictures in each class, the names of the classes, and some to ask about."""
    seed = 0
    for split, numbers in (("train", counts), ("val", [1] * val)):
        for label, count in enumerate(numbers):
            folder = root / split / synset(label)
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                seed += 1
                picture(seed).save(folder / f"{synset(label)}_{number}.JPEG")
    lines = [f"{synset(label)} thing {label}, another name\n" for label in range(len(counts))]
    (root / "LOC_synset_mapping.txt").write_text("".join(lines))
    return root


def make_checkpoints(
    folder: Path,
    num_classes: int,
    rates: Sequence[float] = RATES,
    width: int = WIDTH,
    network: Callable[[int, int], ResNet] = resnet14,
) -> list[str]:
    """A network of :mod:`resnet` with random weights at checkpoints, as options."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["--model", f"resnet:{network.__name__}"]
    options += ["--model-option", f"num_classes={num_classes}", "--model-option", f"width={width}"]
    with torch.random.fork_rng():
        for number, rate in enumerate(rates):
            torch.manual_seed(number)
            path = folder / f"epoch_{30 * (number + 1)}.pt"
            torch.save(network(num_classes, width).state_dict(), path)
            options += ["--checkpoint", f"{path}={rate}"]
    return options


def quick_options(folder: Path) -> list[str]:
    """A made folder of eleven pictures and one that is cut off, and options that go with it."""
    data = make_folder(folder / "imagenet", [4, 4, 4])
    cut = data / "train" / synset(1) / f"{synset(1)}_2.JPEG"
    cut.write_bytes(cut.read_bytes()[:700])
    sizes = ["--resize", "40", "--crop", "32"]
    return ["--data", str(data), *sizes, *make_checkpoints(folder / "checkpoints", 3)]
