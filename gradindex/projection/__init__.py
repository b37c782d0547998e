"""Projection: factors in, blocks of rows out; seeded, without global random state."""

# Each kind registers itself.
from . import dense as dense
from . import fitted as fitted
from . import kronecker as kronecker
from . import sketch as sketch
from . import whole as whole
from .base import PROJECTIONS as PROJECTIONS
from .base import Bases as Bases
from .base import BlockMap as BlockMap
from .base import Fit as Fit
from .base import MapSpec as MapSpec
from .base import Share as Share
from .fitted import SubspaceFit as SubspaceFit
from .hashing import hash64 as hash64
from .hashing import key as key
from .maps import DEFAULT_DIM as DEFAULT_DIM
from .maps import Projection as Projection
from .wide import WideMap as WideMap
