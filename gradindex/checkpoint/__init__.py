"""Checkpoints: one file, those in a folder, and a choice of them."""

from .choosing import by_loss_drop as by_loss_drop
from .choosing import evenly as evenly
from .file import Checkpoint as Checkpoint
from .file import Loaded as Loaded
from .file import read_record as read_record
from .folder import find_checkpoints as find_checkpoints
from .telling import differing_names as differing_names
