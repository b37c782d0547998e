"""Where checkpoints come from: each trainer's files in a file of its own, known by what lies on disk."""

from . import adapters as adapters
from . import distributed as distributed
from . import files as files
from . import loops as loops
from . import trainer as trainer
from .base import SOURCES as SOURCES
from .base import Source as Source
from .base import opened as opened
from .files import recorded as recorded
from .layouts import LAYOUTS as LAYOUTS
from .layouts import Layout as Layout
from .layouts import layout_of as layout_of
from .layouts import place_of as place_of
from .records import ALL as ALL
from .records import UNKNOWN as UNKNOWN
