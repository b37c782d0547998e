r"""Build the store of an ImageNet model: one row for each training picture. Run it again to go on.

    python scripts/imagenet/build.py --data /data/imagenet --out /data/store \
        --checkpoint epoch_30.pt=0.1 --checkpoint epoch_60.pt=0.01 --checkpoint epoch_90.pt=0.001 --workers 8

See docs/imagenet.md for what it costs and for batch queues.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from imagenet_task import make_task, parser, run, task_options
from made import quick_options
from pictures import BrokenPictureError, Files, find_broken, find_classes, list_files, recorded_broken

import gradindex
from gradindex.building import build_part, estimate
from gradindex.choices import FACTOR_TYPES, PRECISIONS, PROJECTION_KINDS, ROW_TYPES
from gradindex.memory import parse_bytes
from gradindex.projection import Projection

PAPERS_DIM = 1472  # numbers a checkpoint that Pruthi et al. 2020 kept for ImageNet
_LISTED = 10


def main(argv: Sequence[str]) -> None:
    """Check, estimate, build."""
    options = _parser().parse_args(argv)
    skip = sorted(_broken(options)) if options.broken == "skip" or options.check else []
    if options.check:
        return
    task = make_task(options, skip)
    chosen = {
        "projection": Projection(options.projection, options.dim, options.seed),
        "memory": None if options.memory is None else parse_bytes(options.memory),
        **{
            name: getattr(options, name)
            for name in ("precision", "row_type", "factors", "device", "workers", "batch_size", "shard_rows")
        },
    }
    print(estimate(task, options.out, part=options.part, **chosen), flush=True)
    if options.dry_run:
        return
    if options.part is not None:
        build_part(task, options.out, options.part, **chosen)
        print(f"{options.out}: part {options.part[0]}/{options.part[1]} is done")
        print(f"once all parts are, run: gradindex seal {options.out}")
        return
    store = gradindex.build(task, options.out, **chosen)
    rows = f"{store.n_train:,} rows of {task.n_train:,} pictures"
    print(f"{options.out}: {rows}, {store.dim:,} numbers each, from {store.n_checkpoints} checkpoints")


def _broken(options: argparse.Namespace) -> dict[int, str]:
    """Broken pictures by position. Parts take what was found before, for they must agree on it."""
    files = list_files(options.data, "train", find_classes(options.data))
    record = options.out.with_name(f"{options.out.name}.checked.jsonl")
    if options.check or (options.part is None and not options.dry_run):
        found = find_broken(files, record, options.workers)
    else:
        recorded = recorded_broken(files, record)
        if recorded is None:
            raise BrokenPictureError(
                f"{record} does not say yet which pictures are broken, and neither parts nor a dry run look for them. "
                "Run the same command with --check in their place first."
            )
        found = recorded
    _report(files, found, record)
    return found


def _report(files: Files, found: dict[int, str], record: Path) -> None:
    print(f"{len(found):,} of {len(files):,} pictures are broken", file=sys.stderr)
    for i in list(found)[:_LISTED]:
        print(f"  id {i}: {files.root / files.name(i)} {found[i]}", file=sys.stderr)
    if len(found) > _LISTED:
        print(f"  and {len(found) - _LISTED:,} more, listed in {record}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    task_options(made)
    group = made.add_argument_group("rows")
    group.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the store")
    group.add_argument("--projection", choices=PROJECTION_KINDS, default="tensorsketch", help="(default: tensorsketch)")
    group.add_argument(
        "--dim", type=int, default=PAPERS_DIM, help=f"numbers a checkpoint (default: {PAPERS_DIM}, the paper's)"
    )
    group.add_argument("--seed", type=int, default=0, help="of the random map (default: 0)")
    group.add_argument("--precision", choices=PRECISIONS, default="float32", help="of gradients (default: float32)")
    group.add_argument("--row-type", choices=ROW_TYPES, default="float32", help="how rows are kept (default: float32)")
    group.add_argument("--factors", choices=FACTOR_TYPES, help="also keep exact factors of linear layers")
    group.add_argument(
        "--shard-rows", type=int, help="rows a file, at least (default: 8192, or as many as make 64 files)"
    )
    group = made.add_argument_group("running")
    group.add_argument("--device", help="such as cuda (default: the processor)")
    group.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        help="processes that decode pictures (default: one a core, at most 8)",
    )
    size = group.add_mutually_exclusive_group()
    size.add_argument("--batch-size", type=int, help="pictures a pass (default: as many, up to 256, as --memory holds)")
    size.add_argument(
        "--memory", metavar="SIZE", help="what a pass may take, such as 2G (default: a quarter of what is free)"
    )
    group.add_argument(
        "--broken",
        choices=("stop", "skip"),
        default="stop",
        help="pictures that cannot be decoded: stop at the first (default), or look for all before and skip them",
    )
    group.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="make the I-th of N parts, beside others; then run `gradindex seal DIR`",
    )
    first = group.add_mutually_exclusive_group()
    first.add_argument("--check", action="store_true", help="look for broken pictures and stop")
    first.add_argument("--dry-run", action="store_true", help="say what disk, memory and time it takes, and stop")
    return made


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"is {text!r}, but must be of the form I/N, such as 2/8")
    return int(found[1]), int(found[2])


def quick(folder: Path) -> None:
    """Look for broken pictures, build, and build again, which finds all done."""
    options = [*quick_options(folder), "--out", str(folder / "store"), "--broken", "skip", "--factors", "float16"]
    main(options)
    main(options)


if __name__ == "__main__":
    run(main, quick)
