"""Other people's packages, imported so that tests can use them."""

import importlib.util
import sys
import warnings

import pytest
import torch

_KEPT = []  # a library's operators are gone with it


def mend_torchvision():
    """Declare operators of a torchvision that was built for another torch, without which transformers does not load."""
    if importlib.util.find_spec("torchvision") is None or "torchvision" in sys.modules:
        return
    try:
        import torchvision  # noqa: F401  # whether it loads
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _KEPT.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _KEPT[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def imported(name):
    """As ``pytest.importorskip``, of a package that may need torchvision."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        pytest.skip(f"needs {name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mend_torchvision()
        return pytest.importorskip(name)
