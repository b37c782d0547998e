"""The ImageNet task from a command line: options that the scripts share, and how they end."""

from __future__ import annotations

import argparse
import ast
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pictures import Files, Pictures, Preparation, Texts, find_classes, list_files, read_names
from torch import Tensor, nn
from torch.nn import functional

import gradindex
from gradindex import Checkpoint, GradIndexError, Task, find_checkpoints
from gradindex.errors import ArgumentError, TaskError
from gradindex.importing import import_by_name

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours, as torchvision has them


@dataclass(frozen=True)
class CrossEntropy:
    """The loss of each example; normalises pictures, which come as bytes, where the network is.

    Args:
        classes: how many there are.
    """

    classes: int

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """(batch,) losses of pictures (batch, 3, h, w) uint8 and labels (batch,)."""
        pictures, labels = batch
        scores = model(normalised(pictures, model))
        if scores.ndim != 2 or scores.shape[1] != self.classes:
            raise TaskError(
                f"The model gives scores of shape {tuple(scores.shape)}, but train has {self.classes} folders, one for "
                "each class (an empty one where there are no pictures). Give the model's size (--model-option "
                f"num_classes={self.classes}, say), or make the folders."
            )
        return functional.cross_entropy(scores, labels, reduction="none")


def normalised(pictures: Tensor, model: nn.Module) -> Tensor:
    """Bytes as the network takes them, in the type of its weights."""
    like = next(model.parameters())
    mean, std = (torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None] for values in (MEAN, STD))
    return (pictures.to(like.device, like.dtype) / 255 - mean) / std


def shown(item: tuple[Any, int]) -> Any:
    """The picture of an example, (h, w, 3) uint8."""
    return item[0].transpose(1, 2, 0)


def data_options(parser: argparse.ArgumentParser) -> None:
    """Where the pictures are, and how they are prepared."""
    group = parser.add_argument_group("pictures")
    group.add_argument("--data", type=Path, required=True, metavar="DIR", help="the folder above train/ and val/")
    group.add_argument("--resize", type=int, default=256, help="pixels of the shorter side (default: 256)")
    group.add_argument("--crop", type=int, default=224, help="pixels of the square in its centre (default: 224)")
    group.add_argument(
        "--upright", action="store_true", help="turn pictures as their EXIF tag says (torchvision does not)"
    )


def task_options(parser: argparse.ArgumentParser) -> None:
    """The pictures, the network and its checkpoints."""
    data_options(parser)
    group = parser.add_argument_group("classes")
    group.add_argument(
        "--names", type=Path, metavar="FILE", help='lines "synset name" (default: LOC_synset_mapping.txt in --data)'
    )
    group.add_argument(
        "--val-labels",
        type=Path,
        metavar="FILE",
        help='for a flat val/: lines "picture synset", such as LOC_val_solution.csv',
    )
    group = parser.add_argument_group("network")
    group.add_argument(
        "--model",
        default="resnet:resnet50",
        metavar="MODULE:FUNCTION",
        help="makes the network (default: the ResNet-50 beside this script)",
    )
    group.add_argument(
        "--model-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of that function; repeatable",
    )
    group.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="PATH=RATE",
        help="weights and their learning rate (without it, the recorded one); repeatable",
    )
    group.add_argument(
        "--checkpoints", type=Path, metavar="DIR", help="instead: a folder that gradindex.Recorder filled"
    )
    group.add_argument(
        "--layers", action="append", metavar="PATTERN", help="tracked modules or parameters; repeatable (default: fc)"
    )


def preparation(options: argparse.Namespace) -> Preparation:
    """How pictures are prepared.

    Raises:
        ArgumentError: the sizes do not go together.
    """
    if not 1 <= options.crop <= options.resize:
        raise ArgumentError(f"--crop is {options.crop}, but must be from 1 to --resize, {options.resize}.")
    return Preparation(options.resize, options.crop, options.upright)


def make_task(options: argparse.Namespace, skip: Sequence[int] | None = None) -> Task:
    """The task that a command line describes.

    Args:
        options: of :func:`task_options`.
        skip: positions of broken pictures.

    Raises:
        GradIndexError: something of it cannot be used.
    """
    prepare, root = preparation(options), options.data
    classes = find_classes(root)
    train = list_files(root, "train", classes)
    asked = (root / "val").exists() or options.val_labels is not None
    val = list_files(root, "val", classes, options.val_labels) if asked else None
    mapping = options.names or root / "LOC_synset_mapping.txt"
    names = read_names(mapping, classes) if options.names or mapping.exists() else classes
    return Task(
        name="ImageNet",
        model=make_model(options),
        loss=CrossEntropy(len(classes)),
        train=Pictures(train, prepare),
        query=None if val is None else Pictures(val, prepare),
        checkpoints=make_checkpoints(options),
        layers=options.layers or ["fc"],
        columns=columns(train, classes, names),
        query_columns={} if val is None else columns(val, classes, names),
        show=shown,
        skip=() if skip is None else skip,
    )


def columns(files: Files, classes: Sequence[str], names: Sequence[str]) -> dict[str, Texts]:
    """Synset, name and path of each picture."""
    synsets, called = (np.array([os.fsencode(text) for text in texts], dtype=np.bytes_) for texts in (classes, names))
    return {"synset": Texts(synsets, files.labels), "name": Texts(called, files.labels), "path": Texts(files.names)}


def make_model(options: argparse.Namespace) -> nn.Module:
    """The network, from its factory.

    Raises:
        TaskError: there is no such function, or it does not give a network.
    """
    arguments = {}
    for given in options.model_option:
        name, equals, text = given.partition("=")
        if not equals:
            raise ArgumentError(f"--model-option is {given!r}, but must look like num_classes=1000.")
        try:
            arguments[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            arguments[name] = text
    factory = import_by_name(options.model, "a function that makes a network")
    try:
        model = factory(**arguments)
    except TypeError as error:
        raise TaskError(f"{options.model} cannot be called so: {error}. Check --model and --model-option.") from error
    if not isinstance(model, nn.Module):
        raise TaskError(f"{options.model} gives a {type(model).__name__}, but must give a torch.nn.Module.")
    return model


def make_checkpoints(options: argparse.Namespace) -> list[Checkpoint]:
    """The checkpoints, in the order given.

    Raises:
        ArgumentError: none are given, or both ways are taken.
        CheckpointError: a folder has none.
    """
    if bool(options.checkpoint) == bool(options.checkpoints):
        raise ArgumentError("Give the checkpoints: either --checkpoint PATH=RATE for each, or --checkpoints DIR.")
    if options.checkpoints:
        return find_checkpoints(options.checkpoints)
    made = []
    for given in options.checkpoint:
        path, _, text = given.rpartition("=")
        try:
            rate = float(text)
        except ValueError:  # a path alone, whatever is in it
            path, rate = given, None
        made.append(Checkpoint(path, learning_rate=rate))
    return made


def run(main: Callable[[Sequence[str]], None], quick: Callable[[Path], None]) -> None:
    """Run a script: errors as one line, Ctrl-C as a pause; ``--quick`` alone runs it on a few made pictures."""
    try:
        if "--quick" in sys.argv:
            if len(sys.argv) > 2:
                print("Error: --quick goes alone, without other options.", file=sys.stderr)
                sys.exit(2)
            with tempfile.TemporaryDirectory() as folder:
                quick(Path(folder))
        else:
            main(sys.argv[1:])
    except GradIndexError as error:
        sys.exit(f"Error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        print("Interrupted. Finished work is kept: rerun the same command to resume.", file=sys.stderr)
        sys.exit(130)


class _Parser(argparse.ArgumentParser):
    """Reads a file of options as a shell would read its lines."""

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """See ``argparse``."""
        return shlex.split(arg_line, comments=True)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that also takes options from a file, given as ``@FILE``."""
    formatter = argparse.RawDescriptionHelpFormatter
    made = _Parser(description=description, formatter_class=formatter, fromfile_prefix_chars="@", allow_abbrev=False)
    made.add_argument("--version", action="version", version=gradindex.__version__)
    made.add_argument("--quick", action="store_true", help="alone: try it on a few pictures that are made for it")
    return made
