#!/bin/sh
# venv.sh PYTHON DIRECTORY REQUIREMENT...: a virtual environment, whatever the machine lacks for it being installed.
set -eu
python=$1 directory=$2
shift 2
if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    [ "$(id -u)" = 0 ] || { echo "install python3-venv first (apt-get install python3-venv)" >&2; exit 1; }
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >/dev/null
fi
[ -x "$directory/bin/pip" ] || "$python" -m venv "$directory"
"$directory/bin/pip" install -q --disable-pip-version-check "$@"
