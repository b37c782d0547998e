# Sourced by demo.sh and test.sh: makes .venv with gradindex and the extras that are asked for.
#
#     environment cpu,demo      # sets $venv to the folder with python, pip and gradindex

environment() {
  local extras=$1 python=${PYTHON:-python3} top stamp want
  top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  venv=$top/.venv/bin
  if ! command -v "$python" >/dev/null; then
    echo "Python is missing ($python): install Python 3.10 to 3.13, or set PYTHON to where it is." >&2
    return 1
  fi
  if ! "$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))'; then
    echo "$python is $("$python" --version 2>&1), but gradindex needs Python 3.10 to 3.13. Set PYTHON to another one." >&2
    return 1
  fi
  if ! "$venv/python" -c 'import pip' 2>/dev/null; then
    if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
      echo "The Python modules venv and ensurepip are missing: on Debian and Ubuntu, apt-get install python3-venv." >&2
      return 1
    fi
    echo "making $top/.venv" >&2
    "$python" -m venv --clear "$top/.venv" || return 1
  fi
  # Installing again is skipped while nothing that decides about it has changed.
  want=$(cat "$top/setup.cfg" "$top/pyproject.toml" "$top/constraints.txt" | cksum)
  for stamp in "$top"/.venv/.installed-*; do
    if [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && among "$extras" "${stamp##*/.installed-}"; then
      return 0
    fi
  done
  echo "installing gradindex[$extras] (the first time downloads PyTorch, about 200 MB)" >&2
  (cd "$top" && "$venv/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]") || {
    echo "Installing failed; see the lines above. Is there a network, and room on the disk?" >&2
    return 1
  }
  echo "$want" >"$top/.venv/.installed-${extras//,/-}"
}

# Whether each of the extras $1 (a,b) is one of those that a stamp is named after, $2 (a-b-c).
among() {
  local extra
  for extra in ${1//,/ }; do
    case "-$2-" in
      *"-$extra-"*) ;;
      *) return 1 ;;
    esac
  done
}
