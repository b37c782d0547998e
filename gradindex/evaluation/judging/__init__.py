"""Scores judged by retraining: do they predict what a model does that never saw some examples?"""

from .judge import Judgement as Judgement
from .judge import judge as judge
from .measures import LDS as LDS
from .measures import Ceiling as Ceiling
from .measures import bootstrap as bootstrap
from .measures import ceiling as ceiling
from .measures import lds as lds
from .removal import RemovalCurve as RemovalCurve
from .removal import removal_curve as removal_curve
from .running import retrain as retrain
from .subsets import all_but as all_but
from .subsets import random_subsets as random_subsets
from .truth import GroundTruth as GroundTruth
