"""Rank all training pictures by self-influence: mislabelled, rare and ambiguous ones come first.

python scripts/imagenet/self_influence.py /data/store --data /data/imagenet -k 100 --html page.html --csv all.csv
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import build
import numpy as np
from imagenet_task import data_options, parser, preparation, run
from made import quick_options
from numpy.typing import NDArray

import gradindex
from gradindex.errors import check_k
from gradindex.files import storing
from gradindex.output import csv_cell, new_file, table
from gradindex.report import Card, Section, Tile, write_page

NOTE = "TracInCP of a picture with itself, never negative; high for mislabelled, rare and ambiguous pictures"
_SHOWN, _AT_ONCE = 20, 8192


def main(argv: Sequence[str]) -> None:
    """Rank, and show."""
    options = _parser().parse_args(argv)
    store = gradindex.GradientStore(options.store)
    k = min(_SHOWN, store.n_train) if options.k is None else options.k
    check_k(k, store.n_train)
    ids, scores = store.ids, store.self_influence().sum(1)
    order = np.lexsort((ids, -scores))
    ids, scores = ids[order], scores[order]
    first = list(_records(store, ids[:k], scores[:k], 1))
    note = f"{store.manifest.self_influence} {NOTE}"
    print(f"{table(first)}\n{note}")
    if options.csv:
        ours = ",".join(first[0]).encode()
        with storing(options.csv), new_file(options.csv, ours) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(first[0]))
            writer.writeheader()
            for start in range(0, len(ids), _AT_ONCE):
                some = slice(start, start + _AT_ONCE)
                for record in _records(store, ids[some], scores[some], start + 1):
                    writer.writerow({name: csv_cell(value) for name, value in record.items()})
        print(options.csv, file=sys.stderr)
    if options.html:
        prepare = preparation(options)
        tiles = [
            Tile(
                prepare(options.data / record["path"]).transpose(1, 2, 0),
                f"id {record['id']}",
                [record["synset"], record["name"], record["path"]],
                score=record["self_influence"],
            )
            for record in first
        ]
        about = Tile(None, f"{store.n_train:,} pictures", [f"the first {len(tiles)}"])
        card = Card(about, {"highest self-influence": tiles})
        write_page(options.html, "Self-influence", note, [Section("Training pictures", cards=[card])])
        print(options.html, file=sys.stderr)


def _records(
    store: gradindex.GradientStore, ids: NDArray[np.int64], scores: NDArray[np.float64], first: int
) -> Iterator[dict[str, Any]]:
    """One mapping for each id, ranked from ``first`` on."""
    values = {name: store.column(name, ids).tolist() for name in ("synset", "name", "path")}
    for place, (i, score) in enumerate(zip(ids.tolist(), scores.tolist(), strict=True)):
        about = {name: column[place] for name, column in values.items()}
        yield {"rank": first + place, "id": i, "self_influence": score, **about}


def _parser() -> argparse.ArgumentParser:
    made = parser(__doc__)
    made.add_argument("store", type=Path, help="what build.py made")
    data_options(made)
    made.add_argument("-k", type=int, help=f"how many to show (default: {_SHOWN}, or all)")
    made.add_argument("--csv", type=Path, metavar="FILE", help="also write all of them")
    made.add_argument("--html", type=Path, metavar="PAGE", help="also write a page with thumbnails of the first")
    return made


def quick(folder: Path) -> None:
    """Build, then rank."""
    options = quick_options(folder)
    build.main([*options, "--out", str(folder / "store"), "--broken", "skip"])
    data = options[: options.index("--model")]
    pages = ["--csv", str(folder / "all.csv"), "--html", str(folder / "page.html")]
    main([str(folder / "store"), *data, "-k", "5", *pages])


if __name__ == "__main__":
    run(main, quick)
