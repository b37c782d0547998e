"""Projection: factors in, blocks of rows out; seeded, without global random state."""

from .maps import DEFAULT_DIM as DEFAULT_DIM
from .maps import BlockMap as BlockMap
from .maps import Projection as Projection
