"""Tiny models with random weights, as libraries make them."""

import os
import warnings

import pytest
import torch
from frameworks import imported

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def transformers():
    module = imported("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is imported at first use
        module.GPT2LMHeadModel, module.BertForMaskedLM  # noqa: B018
    return module


@pytest.fixture(scope="session")
def gpt2(transformers):
    """Makes a causal language model."""

    def make(seed=0):
        torch.manual_seed(seed)
        config = transformers.GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=1, n_head=2)
        return transformers.GPT2LMHeadModel(config).eval()

    return make


@pytest.fixture(scope="session")
def bert(transformers):
    """Makes a model of the family of BERT."""

    def make(head, **options):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=16, **options,
        )  # fmt: skip
        return getattr(transformers, head)(config).eval()

    return make
