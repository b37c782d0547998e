"""Gradients: factors of every tracked layer, batch by batch (owns autograd and hooks)."""

from .engine import HALF as HALF
from .engine import Engine as Engine
from .engine import Precision as Precision
from .products import Products as Products
from .tracked import Tracked as Tracked
from .tracked import continued as continued
