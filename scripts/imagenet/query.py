r"""Show the training pictures behind a model's answers on other pictures: top proponents and opponents.

    python scripts/imagenet/query.py /data/store --data /data/imagenet --position 17 --html page.html \
        --checkpoint epoch_30.pt=0.1 --checkpoint epoch_60.pt=0.01 --checkpoint epoch_90.pt=0.001

A picture from elsewhere (--file) is asked about as the class that the last checkpoint sees in it, or as --class.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import build
import numpy as np
import torch
from imagenet_task import make_task, normalised, parser, preparation, run, task_options
from made import quick_options
from numpy.typing import NDArray
from pictures import find_classes
from torch.func import functional_call

import gradindex
from gradindex import Task
from gradindex.choices import RERANKS
from gradindex.errors import ArgumentError
from gradindex.retrieval.hits import Hits, as_text


def main(argv: Sequence[str]) -> None:
    """Ask, and show."""
    made = _parser()
    options = made.parse_args(argv)
    if options.synset is not None and not options.file:
        made.error("--class goes with --file; pictures of val/ have their class.")
    store, task = gradindex.GradientStore(options.store), make_task(options)
    # What has no row is not read, for it may be broken.
    task = replace(task, skip=np.setdiff1d(np.arange(task.n_train), store.ids))
    retriever = gradindex.load(task, options.store, device=options.device)
    queries = _items(options, task) if options.file else options.position
    asked = retriever.prepare(queries)
    kinds = ("proponents", "opponents") if options.kind == "both" else (options.kind,)
    answers = [retriever.search(asked, options.k, kind=kind, rerank=options.rerank) for kind in kinds]
    if options.file:
        answers = [_named(hits, options, [label for _, label in queries]) for hits in answers]
    print(as_text(answers))
    if options.html:
        answers[0].save_html(options.html, *answers[1:])
        print(options.html, file=sys.stderr)


def _items(options: argparse.Namespace, task: Task) -> list[tuple[NDArray[np.uint8], int]]:
    """Files as the task's data sets would hand them out, labelled as asked for or as the last checkpoint sees them."""
    pictures = np.stack([preparation(options)(path) for path in options.file])
    if options.synset is not None:
        classes = find_classes(options.data)
        if options.synset not in classes:
            raise ArgumentError(f"--class is {options.synset!r}, for which train has no folder. Give a synset.")
        labels = [classes.index(options.synset)] * len(pictures)
    else:
        task.model.eval()
        with torch.no_grad():
            batch = normalised(torch.from_numpy(pictures), task.model)
            scores = functional_call(task.model, task.checkpoints[-1].load(task.model), batch)
        labels = scores.argmax(1).tolist()
    return list(zip(pictures, labels, strict=True))


def _named(hits: Hits, options: argparse.Namespace, labels: list[int]) -> Hits:
    """The same with the names of the files that were asked about, and what they were taken for."""
    classes = find_classes(options.data)
    what = "class" if options.synset is not None else "predicted"
    columns = {what: np.array([classes[label] for label in labels])}
    return replace(hits, queries=tuple(map(str, options.file)), query_columns=columns)


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("store", type=Path, help="what build.py made")
    task_options(made)
    group = made.add_argument_group("queries")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--position", type=int, action="append", help="position among the pictures of val/; repeatable")
    which.add_argument("--file", type=Path, action="append", help="a picture; repeatable")
    group.add_argument("--class", dest="synset", metavar="SYNSET", help="the class of --file")
    group.add_argument("-k", type=int, default=10, help="hits for each query (default: 10)")
    group.add_argument("--kind", choices=("both", "proponents", "opponents"), default="both", help="(default: both)")
    group.add_argument(
        "--rerank",
        choices=RERANKS,
        default="exact",
        help="the last stage: exact scores (default), full rows, or the index's own estimates",
    )
    group.add_argument("--device", help="such as cuda (default: the processor)")
    group.add_argument("--html", type=Path, metavar="PAGE", help="also write a page with thumbnails")
    return made


def quick(folder: Path) -> None:
    """Build, then ask about a picture of val/ and about a file."""
    options = quick_options(folder)
    build.main([*options, "--out", str(folder / "store"), "--broken", "skip"])
    page = folder / "page.html"
    main([str(folder / "store"), *options, "--position", "0", "-k", "3", "--html", str(page)])
    (first,) = sorted((folder / "imagenet" / "val").glob("*1/*"))
    main([str(folder / "store"), *options, "--file", str(first), "-k", "3"])


if __name__ == "__main__":
    run(main, quick)
