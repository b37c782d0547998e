"""Kinds of indexes: how rows are coded, all compared or in lists, and searched."""

# Each kind registers itself.
from . import flat as flat
from . import ivf as ivf
from . import pq as pq
from . import spill as spill
from .base import INDEXES as INDEXES
from .base import IndexMethod as IndexMethod
from .base import Rows as Rows
