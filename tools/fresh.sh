# A folder in which one run of the tests or the demo lives, and the ordinary user it belongs to. Sourced, never run.
# shellcheck shell=bash
#
#   $fresh/src      the tracked files as they are now (with local changes), when run as root
#   $fresh/venv     a virtual environment with the wheel built from them; dependencies come from the cache
#   $fresh/home     an empty home            $fresh/run   XDG_RUNTIME_DIR
#
# As root everything runs under a user id that nothing else uses: Cloister is for ordinary users, and root
# hides failures. All processes of that id are ended with the folder, so nothing can stay behind.

source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# 60706 to 61183 is used by nothing: systemd's UIDS-GIDS document lists the range as unused, Debian policy reserves it.
pick_uid() {
    local uid
    for uid in $(shuf -i 60706-61183 -n 50); do
        if ! getent passwd "$uid" >/dev/null && ! pgrep --uid "$uid" >/dev/null; then
            printf '%s\n' "$uid"
            return
        fi
    done
    fail "no free user id between 60706 and 61183"
}

as_user() {
    if [[ $(id -u) == 0 ]]; then
        setpriv --reuid "$uid" --regid "$uid" --clear-groups --inh-caps=-all "$@"
    else
        "$@"
    fi
}

# Run a command as the ordinary user, in the source folder, with an environment made from nothing.
in_fresh() {
    as_user env -i \
        HOME="$fresh/home" USER=cloister-test LOGNAME=cloister-test SHELL=/bin/bash LANG=C.UTF-8 TERM="${TERM:-dumb}" \
        XDG_RUNTIME_DIR="$fresh/run" TMPDIR="$fresh/tmp" PATH="$fresh/venv/bin:$environment/bin:/usr/bin:/bin:/usr/sbin:/sbin" \
        CI="${CI:-}" CLOISTER_TEST_AGENTS="${agents:-}" PYTHONDONTWRITEBYTECODE=1 \
        env -C "$source_dir" "$@"
}

end_fresh() {
    local status=$?
    trap - EXIT INT TERM HUP
    if [[ -n ${uid:-} && $(id -u) == 0 ]]; then
        # A fork bomb may make more while we look: repeat until none is left.
        local try
        for try in 1 2 3 4 5; do
            pkill --signal KILL --uid "$uid" || break
            sleep 0.2
        done
        [[ $try == 1 ]] || say "processes were left behind and have been ended"
    fi
    rm -rf --one-file-system "$fresh"
    exit "$status"
}

make_fresh() {
    environment=$("$root/tools/environment")
    fresh=$(mktemp -d /tmp/cloister.XXXXXX)
    trap end_fresh EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    mkdir "$fresh/home" "$fresh/tmp"
    mkdir -m 700 "$fresh/run"
    source_dir=$root
    if [[ $(id -u) == 0 ]]; then
        uid=$(pick_uid)
        source_dir=$fresh/src
        mkdir "$source_dir"
        git -C "$root" ls-files -z --cached --others --exclude-standard |
            (cd "$root" && tar --create --null --files-from=- --ignore-failed-read) 2>/dev/null |
            tar --extract --directory "$source_dir" --no-same-owner
        chown -R "$uid:$uid" "$fresh"
        # Tests ask git which files are tracked; the copy gets a repository of its own that says so.
        as_user env -C "$source_dir" HOME="$fresh/home" git -c init.defaultBranch=main init --quiet
        as_user env -C "$source_dir" HOME="$fresh/home" git add --all
    fi
    make_wheel
}

# Build the wheel from the sources and install it: what is tested is what is shipped.
make_wheel() {
    local site
    as_user "$environment/bin/python" -m venv --without-pip "$fresh/venv"
    site=$("$fresh/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' |
        as_user tee "$site/dependencies.pth" >/dev/null
    in_fresh "$environment/bin/python" -m hatchling build --target wheel --directory "$fresh/wheel" >/dev/null 2>"$fresh/build" ||
        { cat "$fresh/build" >&2 && fail "the wheel does not build"; }
    in_fresh "$environment/bin/python" -m pip --python "$fresh/venv/bin/python" install --quiet \
        --disable-pip-version-check --no-deps --no-index "$fresh"/wheel/*.whl
}
