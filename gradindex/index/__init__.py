"""Index: rows in, the largest inner products out."""

from .compact import MANIFEST as MANIFEST
from .compact import CompactIndex as CompactIndex
from .compact import LeftOut as LeftOut
from .compact import checked as checked
from .exact import Blocks as Blocks
from .exact import SearchIndex as SearchIndex
from .gpu import devices as devices
from .kinds import INDEXES as INDEXES
from .kinds import IndexMethod as IndexMethod
from .kinds import Rows as Rows
from .library import paired_products as paired_products
from .library import require as require
from .shapes import Shape as Shape
from .shapes import fitted_directions as fitted_directions
