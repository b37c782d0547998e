"""Where the checkout, its tests and the data lie."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parent
TOP = TESTS.parent
GOLDEN = TOP / "data" / "golden"
DATA = Path(os.environ.get("GRADINDEX_DATA", TOP.parent / "shared" / "data"))
