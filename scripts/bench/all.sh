#!/usr/bin/env bash
# Every script of scripts/bench, scripts/paper, scripts/quality and scripts/imagenet, one after another, and what falls
# short at the end.
# --quick: small stand-ins, a few minutes. Without it, hours: what is done is kept, so run it again to go on.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
environment cpu,dev
exec "$venv/python" "$(dirname "${BASH_SOURCE[0]}")/all.py" "$@"
