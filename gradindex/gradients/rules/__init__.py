"""What a hook can know about a module: its parameters' per-example gradients from its input and output gradient.

Each rule knows one kind of module. Nothing here is trusted: the engine compares every layer
with autograd on examples before it is used.
"""

from collections.abc import Mapping

from .base import Rule as Rule
from .convolutions import ChannelBias, Convolution, TransposedConvolution
from .linear import Embedding, EmbeddingBag, Linear, TransposedLinear
from .normalisation import Normalisation

RULES: Mapping[str, Rule] = {
    "linear": Linear(),
    "linear^T": TransposedLinear(),
    "convolution": Convolution(),
    "convolution^T": TransposedConvolution(),
    "channel bias": ChannelBias(),
    "normalisation": Normalisation(),
    "embedding": Embedding(),
    "embedding bag": EmbeddingBag(),
}

# Rules for one parameter of a module whose others have another layer.
SINGLE = (TransposedConvolution, ChannelBias)
