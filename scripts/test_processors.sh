#!/usr/bin/env bash
# The numeric tests again as other processors would run them; arguments are handed on to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
environment cpu,dev
exec "$venv/python" scripts/processors.py "$@"
