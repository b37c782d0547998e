"""Judges: how much of the truth an answer holds, and how many mislabelled examples a ranking finds."""

from .measuring import evaluate as evaluate
from .mislabel import share_found as share_found
from .recall import recall_at_k as recall_at_k
from .tuning import index as index
