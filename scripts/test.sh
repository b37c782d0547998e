#!/usr/bin/env bash
# Make .venv, install gradindex with its dev extras (CPU), run the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "Python is missing: install Python 3.10 to 3.13, or set PYTHON." >&2; exit 1; }
if [ ! -x .venv/bin/python ]; then
  "$python" -m venv .venv || { echo "venv is missing: install it (Debian: apt-get install python3-venv)." >&2; exit 1; }
fi
.venv/bin/python -m pip install --quiet -c constraints.txt -e '.[cpu,safetensors,dev]'
.venv/bin/python -m pytest -q "$@"
