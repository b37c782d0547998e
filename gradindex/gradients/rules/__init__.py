"""What a hook can know about a module: its parameters' per-example gradients from its input and output gradient.

Each rule knows one kind of module. Nothing here is trusted: every layer is compared with autograd on examples before it
is used.
"""

# Each rule registers itself.
from . import convolutions as convolutions
from . import linear as linear
from . import normalisation as normalisation
from .base import RULES as RULES
from .base import Plain as Plain
from .base import Rule as Rule
