"""What the tests of builds share."""

import pytest
import toys
from growing import word


@pytest.fixture
def task(tmp_path):
    """30 examples, each with a word."""
    return toys.make_task(tmp_path, n_train=30, columns={"word": [word(i) for i in range(30)]})
