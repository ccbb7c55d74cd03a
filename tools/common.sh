# What the scripts in this folder share: where the cache is, and how they speak. Sourced, never run.
# shellcheck shell=bash

set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# One cache for all checkouts of a user. It holds only what the lock files name, keyed by their content.
if [[ -n ${CLOISTER_DEV_CACHE:-} ]]; then
    cache=$CLOISTER_DEV_CACHE
elif [[ $(id -u) == 0 ]]; then
    cache=/var/cache/cloister-dev
else
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/cloister-dev
fi

say() { printf '==> %s\n' "$*" >&2; }

fail() {
    printf 'error: %s\n' "$1" >&2
    [[ $# -lt 2 ]] || printf '  try: %s\n' "$2" >&2
    exit 1
}

# Debian's own Python first: one from a home directory is of no use to the ordinary user who runs the tests.
find_python() {
    local candidate
    for candidate in ${PYTHON:-} /usr/bin/python3 python3 python3.13 python3.12 python3.11; do
        candidate=$(command -v "$candidate" 2>/dev/null) || continue
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer with the venv module" "apt-get install python3-venv"
}

# The first 16 hex digits of the SHA-256 of some files: the name under which what they describe is kept.
digest() { cat -- "$@" | sha256sum | cut -c1-16; }

# Run a command while holding a lock of the cache, so that two checkouts never fill the same folder at once.
with_lock() {
    local name=$1
    shift
    mkdir -p "$cache"
    # Root's cache is read by the ordinary user who runs the tests, whatever root's umask is.
    [[ $(id -u) != 0 ]] || chmod a+rx "$cache"
    exec 9>"$cache/$name.lock"
    flock 9
    "$@"
    exec 9>&-
}
