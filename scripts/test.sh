#!/usr/bin/env bash
# Everything that must hold: lint and format, the documentation's pages, types, import rules, tests (README's and docs' commands among them).
# Arguments are handed on to pytest: bash scripts/test.sh -k store. A process for each core, so one thread in each.
# Beside it, for it takes longer than three minutes: bash scripts/test_processors.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
environment cpu,demo,dev  # with the demo's, so that its test installs nothing beside others
"$venv/ruff" check .
"$venv/ruff" format --check .
NO_MKDOCS_2_WARNING=1 "$venv/mkdocs" build --strict --quiet  # a dead link or a name that is gone fails; build/site has the pages
"$venv/mypy"
"$venv/lint-imports" --no-logo || { echo "An import points up, or a package has a second owner: docs/architecture.md." >&2; exit 1; }
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$venv/python" -m pytest -q -n auto --dist worksteal "$@"
