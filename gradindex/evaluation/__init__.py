"""Judges: how much of the truth an answer holds, how many mislabelled examples a ranking finds, and whether scores
predict what a retrained model does.
"""

from .ekfac import ekfac_scores as ekfac_scores
from .judging import LDS as LDS
from .judging import Ceiling as Ceiling
from .judging import GroundTruth as GroundTruth
from .judging import Judgement as Judgement
from .judging import RemovalCurve as RemovalCurve
from .judging import all_but as all_but
from .judging import bootstrap as bootstrap
from .judging import ceiling as ceiling
from .judging import judge as judge
from .judging import lds as lds
from .judging import random_subsets as random_subsets
from .judging import removal_curve as removal_curve
from .judging import retrain as retrain
from .measuring import evaluate as evaluate
from .mislabel import roc_auc as roc_auc
from .mislabel import share_found as share_found
from .recall import recall_at_k as recall_at_k
from .tuning import index as index
