"""Other people's packages, which tests need and this project does not."""

import warnings

import pytest


def imported(name):
    """As ``pytest.importorskip``; what warns while it is imported is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)
