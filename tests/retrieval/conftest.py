"""Stores that several files ask, and what brute force answers for them."""

import numpy as np
import pytest
from questions import M, N, make


@pytest.fixture(scope="session")
def factors(tmp_path_factory):
    return make(tmp_path_factory.mktemp("factors"), factors="float32")


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    return make(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def unit(tmp_path_factory):
    return make(tmp_path_factory.mktemp("unit"), unit_norm=True, factors="float32")


@pytest.fixture(scope="session")
def indexed(tmp_path_factory):
    return make(tmp_path_factory.mktemp("indexed"), factors="float32", index=True)


@pytest.fixture(scope="session")
def truth(factors):
    return factors.exact_scores(range(M)).astype(np.float64)


@pytest.fixture(scope="session")
def estimates(factors):
    return factors.query_rows(range(M)) @ factors.store.rows(np.arange(N)).T
