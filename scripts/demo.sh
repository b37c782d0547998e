#!/usr/bin/env bash
# Make .venv, install what the demo needs (CPU), run `gradindex demo`; arguments are handed on to it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
environment cpu,demo
exec "$venv/gradindex" demo "$@"
