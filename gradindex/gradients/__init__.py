"""Gradients: factors of every tracked layer, batch by batch (owns autograd and hooks)."""

from ..choices import Precision as Precision
from .check import check_queries as check_queries
from .check import check_routes as check_routes
from .engine import Engine as Engine
from .geometry import GEOMETRIES as GEOMETRIES
from .geometry import AdamDiagonal as AdamDiagonal
from .geometry import Cosine as Cosine
from .geometry import Geometry as Geometry
from .geometry import TracIn as TracIn
from .geometry import with_unit_norm as with_unit_norm
from .losses import mixed as mixed
from .losses import non_finite as non_finite
from .passes import in_batches as in_batches
from .precision import HALF as HALF
from .products import Products as Products
from .retrained import QueryLosses as QueryLosses
from .tokens import TokenProducts as TokenProducts
from .tracked import Tracked as Tracked
from .tracked import continued as continued
