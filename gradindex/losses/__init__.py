"""Per-example losses of models of transformers, TRL, timm and torchvision, for :class:`gradindex.Task`.

Each is made by a function, such as ``causal_lm()``, and is called as ``loss(model, batch) -> (n,)``. Batches are what
the library's own collate functions make.
"""

from .base import PerExampleLoss as PerExampleLoss
from .base import name_of as name_of
from .classes import binary_cross_entropy as binary_cross_entropy
from .classes import cross_entropy as cross_entropy
from .classes import multiple_choice as multiple_choice
from .classes import sequence_classification as sequence_classification
from .detection import detection as detection
from .preference import contrastive as contrastive
from .preference import dpo as dpo
from .texts import Documents as Documents
from .texts import Masked as Masked
from .tokens import TokenLoss as TokenLoss
from .tokens import causal_lm as causal_lm
from .tokens import masked_lm as masked_lm
from .tokens import token_classification as token_classification
