"""``python -m gradindex.cli``."""

from . import main

main()
