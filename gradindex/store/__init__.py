"""The store: rows that are never lost, never wrong, never all in memory (docs/format.md)."""

from . import runs as runs
from .bases import Bases as Bases
from .bases import digest_of_bases as digest_of_bases
from .bases import read_bases as read_bases
from .bases import write_bases as write_bases
from .encoding import ROW_TYPES as ROW_TYPES
from .encoding import RowType as RowType
from .encoding import check_row_type as check_row_type
from .encoding import number_bytes as number_bytes
from .export import export as export
from .job import Job as Job
from .job import Part as Part
from .job import claimed as claimed
from .job import progress_of as progress_of
from .manifest import differences as differences
from .manifest import fingerprint as fingerprint
from .overview import overview as overview
from .reader import GradientStore as GradientStore
from .upkeep import changing as changing
from .upkeep import compact as compact
from .upkeep import kept as kept
from .upkeep import live_plan as live_plan
from .upkeep import merge as merge
from .upkeep import remove as remove
from .upkeep import rewritten as rewritten
from .upkeep import seal as seal
