#!/usr/bin/env bash
# Everything that must hold: lint and format, the documentation's pages, types (typing_tests/ too), import rules, tests
# (README's and docs' commands among them).
#
#     bash scripts/test.sh                  # all of it: several minutes
#     bash scripts/test.sh --fast           # without the pages and the tests that are marked slow: within 90 seconds
#     bash scripts/test.sh [--fast] -k ...  # further arguments are handed on to pytest
#
# A process for each core, so one thread in each. The numeric tests under other processors' instructions take longer
# and stand beside it: bash scripts/test_processors.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
unset PYTHONDONTWRITEBYTECODE  # many processes load the same modules: compile them once
fast=
if [ "${1-}" = --fast ]; then
  fast=yes
  shift
  set -- -m "not slow" "$@"
fi
environment cpu,demo,dev  # with the demo's, so that its test installs nothing beside others
"$venv/ruff" check .
"$venv/ruff" format --check .
if [ -z "$fast" ]; then  # a dead link or a name that is gone fails; build/site has the pages
  NO_MKDOCS_2_WARNING=1 "$venv/mkdocs" build --strict --quiet
fi
"$venv/mypy"
"$venv/lint-imports" --no-logo || { echo "An import points up, or a package has a second owner: docs/architecture.md." >&2; exit 1; }
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} "$venv/python" -m pytest -q -n auto --dist worksteal "$@"
