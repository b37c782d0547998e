"""Verifying what will be read before it is: whole arrays in the order of the files, in large reads."""

from __future__ import annotations

from collections.abc import Iterator

from .container import BLOCK_BYTES, blocks_of
from .shards import OpenShards

# What is verified between two looks at whether anybody still wants it: 5 to 20 ms of a processor.
_AT_ONCE = (8 << 20) // BLOCK_BYTES


def bytes_of(shards: OpenShards, count: int, beginnings: tuple[str, ...]) -> int:
    """What :func:`verified` goes through, in bytes; files count by whole blocks.

    Raises:
        StoreError: a seal is missing or damaged.
    """
    seals = (shards.seal(number) for number in range(count))
    return sum(len(blocks_of(seal, beginnings)) * int(seal["block_bytes"]) for seal in seals)


def verified(shards: OpenShards, count: int, beginnings: tuple[str, ...]) -> Iterator[int]:
    """Verify arrays of all shards; blocks that were verified before are passed over, and new ones need not be again.

    Args:
        shards: open; others may read from them meanwhile.
        count: how many there are.
        beginnings: of the names of the arrays.

    Yields:
        How many bytes are through, after each piece.

    Raises:
        StoreError: a block is damaged.
        StoreChangedError: the store went on without one of the files.
    """
    for number in range(count):
        seal = shards.seal(number)
        blocks = blocks_of(seal, beginnings)
        for start in range(0, len(blocks), _AT_ONCE):
            piece, then = blocks[start : start + _AT_ONCE], blocks[start + _AT_ONCE : start + 2 * _AT_ONCE]
            shards[number].arrays.verify(piece, then)  # asked for anew: not all shards may stay open
            yield len(piece) * int(seal["block_bytes"])
