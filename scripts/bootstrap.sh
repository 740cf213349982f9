#!/bin/sh
# Prepare this clone. The Makefile calls it before every target; with nothing to do it returns at once.
#
#   scripts/bootstrap.sh venv       .venv with exactly what requirements.lock names, and the package itself
#   scripts/bootstrap.sh services   RabbitMQ, Java and Maven for Kafka, openssl, libfaketime and promtool for the tests,
#                                   as Debian packages, if we are root
#
# Asks for Python 3.11 or newer and nothing else. Writes into the clone and the download caches only, unless it
# is root and a Debian package is missing.
set -eu
cd "$(dirname "$0")/.."

# One at a time: `make test` and `make demo` may start together. -o: what we start must not inherit the lock.
if [ -z "${BOOTSTRAP_LOCKED:-}" ] && command -v flock >/dev/null; then
    BOOTSTRAP_LOCKED=1 exec flock -o scripts/bootstrap.sh sh scripts/bootstrap.sh "$@"
fi

python=.venv/bin/python
stamp=.venv/.installed

say() {
    printf '%s\n' "$*" >&2
}

fail() {
    say "$*"
    exit 1
}

venv() {
    wanted=$(cat requirements.lock pyproject.toml scripts/bootstrap.sh | cksum)
    # The place is part of it: programs in a virtual environment hold its path.
    where=$(pwd)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted $where" ] && "$python" -c '' 2>/dev/null; then
        return
    fi
    # An older lock's environment is brought up to date; a half-made, moved or broken one starts anew.
    case $(cat "$stamp" 2>/dev/null) in
        *" $where") "$python" -c '' 2>/dev/null || rm -rf .venv ;;
        *) rm -rf .venv ;;
    esac
    rm -f "$stamp"

    say "Setting up .venv"
    if uv=$(find_uv); then
        [ -x "$python" ] || make_venv_with_uv
    else
        make_venv_with_pip
    fi
    choose_cache
    # Compiled once: hundreds of processes that each compile what they import would take twice as long to start.
    "$uv" pip sync --quiet --python "$python" --require-hashes --compile-bytecode requirements.lock
    # The build backend is in the lock too, so that this step downloads nothing.
    "$uv" pip install --quiet --python "$python" --offline --no-deps --no-build-isolation --editable .
    printf '%s %s\n' "$wanted" "$where" >"$stamp"
}

find_uv() {
    for candidate in .venv/bin/uv uv; do
        # Being on PATH is not enough: version managers put launchers there that only complain.
        if "$candidate" --version >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

make_venv_with_uv() {
    base=$(find_python sys) || fail "Python 3.11 or newer is needed and none was found on PATH."
    "$uv" venv --quiet --no-project --python "$base" .venv
}

make_venv_with_pip() {
    if ! base=$(find_python ensurepip); then
        find_python sys >/dev/null || fail "Python 3.11 or newer is needed and none was found on PATH."
        # Debian ships Python's venv module as a package of its own.
        can_install || fail "Python's venv module is missing: install python3-venv (as root: apt-get install python3-venv), or uv."
        install_packages python3-venv
        base=$(find_python ensurepip) || fail "Python's venv module is still missing after installing python3-venv; install uv instead."
    fi
    "$base" -m venv .venv
    uv=.venv/bin/uv
    # uv by its own entry of the lock, hashes and all.
    sed -n '/^uv==/,/[^\\]$/p' requirements.lock >.venv/uv.lock
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --requirement .venv/uv.lock
}

# The path of the newest Python that we support and that has the module $1.
find_python() {
    for candidate in python3.14 python3.13 python3.12 python3.11 python3; do
        if "$candidate" -c "import sys, $1; sys.exit(sys.version_info < (3, 11) or print(sys.executable))" 2>/dev/null; then
            return
        fi
    done
    return 1
}

# Go without uv's cache where it cannot be written, in a read-only home for instance.
choose_cache() {
    cache=$("$uv" cache dir)
    if ! mkdir -p "$cache" 2>/dev/null || ! [ -w "$cache" ]; then
        export UV_NO_CACHE=1
    fi
}

services() {
    set --
    have rabbitmq-server || set -- "$@" rabbitmq-server
    have_java || set -- "$@" default-jre-headless
    have mvn || set -- "$@" maven
    have openssl || set -- "$@" openssl
    have_faketime || set -- "$@" libfaketime
    # Debian has promtool in the package of the whole server.
    have promtool || set -- "$@" prometheus
    if [ $# -eq 0 ]; then
        return
    elif ! can_install; then
        say "Not installed: $*. Tests that need it cannot run (on Debian, as root: apt-get install $*; no service need run)."
    elif ! install_packages "$@"; then
        say "Could not install: $*. Tests that need it cannot run."
    fi
}

# The places where tests/support/rabbitmq.py looks.
have() (
    PATH="/usr/lib/rabbitmq/bin:$PATH:/usr/sbin:/usr/local/sbin"
    command -v "$1" >/dev/null
)

# A Java that runs Kafka, as tests/support/kafka asks for it.
have_java() {
    version=$(java -version 2>&1 | sed -n 's/.* version "\([0-9]*\).*/\1/p')
    [ "${version:-0}" -ge 17 ]
}

# Where tests/support/beats.py looks.
have_faketime() {
    for library in /usr/lib/*/faketime/libfaketimeMT.so.1 /usr/lib*/faketime/libfaketimeMT.so.1; do
        if [ -e "$library" ]; then
            return
        fi
    done
    return 1
}

can_install() {
    [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null
}

# Install Debian packages, but start none of their services, neither now nor at the next boot.
install_packages() (
    say "Installing $*"
    policy=/usr/sbin/policy-rc.d
    if ! [ -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        trap 'exit 1' HUP INT TERM
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq || say "apt-get update failed; trying with the package lists at hand"
    apt-get install -qq -o DPkg::Lock::Timeout=300 --no-install-recommends "$@" >/dev/null || exit
    for service in rabbitmq-server prometheus; do
        case " $* " in
            *" $service "*) systemctl disable --now "$service" >/dev/null 2>&1 || : ;;
        esac
    done
)

case "$#:${1:-}" in
    1:venv | 1:services) "$1" ;;
    *) fail "usage: scripts/bootstrap.sh venv|services" ;;
esac
