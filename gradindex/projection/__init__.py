"""Projection: factors in, blocks of rows out; seeded, without global random state."""

from .hashing import hash64 as hash64
from .hashing import key as key
from .maps import DEFAULT_DIM as DEFAULT_DIM
from .maps import Bases as Bases
from .maps import BlockMap as BlockMap
from .maps import Projection as Projection
from .sides import Share as Share
from .sides import SubspaceFit as SubspaceFit
