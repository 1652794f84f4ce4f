#!/bin/sh
# What `make test` does: ruff, mypy and all tests on the first Python of 3.11, 3.12, 3.13 that the machine has, the unit
# tests and the daemon's becoming one on the others, too; EVERY=1: all on each.  They run against the wheel as it is
# installed.  Needs only python3; as root on Debian it installs what else is wanted.
set -eu
cd "$(dirname "$0")/.."

packages="systemd-container shellcheck devscripts logrotate strace procps iproute2 util-linux tzdata groff-base man-db sudo faketime openssl redis-server beanstalkd zookeeper postgresql php-cli php-redis gcc libc6-dev"
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    missing=$(for package in $packages; do dpkg -s "$package" >/dev/null 2>&1 || echo "$package"; done)
    if [ -n "$missing" ]; then
        apt-get update -qq
        # shellcheck disable=SC2086  # a list of words
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $missing >/dev/null
    fi
fi

find_python() {
    for candidate in "python$1" "$HOME"/.pyenv/versions/"$1".*/bin/python3 /usr/bin/"python$1" /usr/local/bin/"python$1"; do
        path=$(command -v "$candidate" 2>/dev/null) || continue
        # A pyenv shim may stand for a version that is not chosen here.
        if [ "$("$path" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$1" ]; then
            "$path" -c 'import sys; print(sys.executable)'
            return
        fi
    done
}

tools="pytest pytest-xdist hypothesis docutils cloudpickle flask gunicorn kazoo pure-sasl pg8000 redis sysv-ipc"
wheel=""
tested=""
for version in 3.11 3.12 3.13; do
    python=$(find_python "$version")
    [ -n "$python" ] || continue
    venv=.venv-$version
    # shellcheck disable=SC2086  # a list of words
    if [ -z "$wheel" ]; then
        sh tests/venv.sh "$python" "$venv" build ruff mypy $tools
        rm -rf build dist
        "$venv/bin/python" -m build --outdir dist . >/dev/null
        wheel=$(ls dist/*.whl)
        "$venv/bin/pip" install -q --disable-pip-version-check --force-reinstall "$wheel"
        "$venv/bin/ruff" check .
        "$venv/bin/ruff" format --check .
        "$venv/bin/mypy"
        selected=tests
    else
        sh tests/venv.sh "$python" "$venv" $tools
        "$venv/bin/pip" install -q --disable-pip-version-check --force-reinstall "$wheel"
        # What the other system tests look at is the kernel's and systemd's more than Python's; what is left out, texts
        # and the arithmetic of schedules.
        units=$(find tests -maxdepth 1 -name 'test_*.py' | grep -v -e architecture -e docs -e unit.py -e schedule | sort)
        [ -n "${EVERY:-}" ] || selected="$units tests/system/test_becoming_a_daemon.py"
    fi
    echo "== Python $version"
    # The tests import the installed wheel, not the checkout: the checkout is not on the path.  They mostly wait for
    # processes, so there are two at a time for each processor.  One that hangs for ten minutes shows its
    # stack and ends its process, which fails it.
    # shellcheck disable=SC2086  # a list of words
    "$venv/bin/python" -P -m pytest --import-mode=importlib -q -n "$((2 * $(nproc)))" --dist worksteal --durations=25 \
        -o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true $selected "$@"
    tested="$tested $version"
done
[ -n "$tested" ] || { echo "no Python 3.11, 3.12 or 3.13 here; install python3" >&2; exit 1; }
echo "tested on Python$tested"
