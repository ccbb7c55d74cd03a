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

# Run a command as the ordinary user, in the source folder, with an environment made from nothing. `place` may name
# another folder with a home, run and tmp.
in_fresh() {
    local own=${place:-$fresh}
    as_user env -i \
        HOME="$own/home" USER=cloister-test LOGNAME=cloister-test SHELL=/bin/bash LANG=C.UTF-8 TERM="${TERM:-dumb}" \
        XDG_RUNTIME_DIR="$own/run" TMPDIR="$own/tmp" PATH="$fresh/venv/bin:$environment/bin:/usr/bin:/bin:/usr/sbin:/sbin" \
        CI="${CI:-}" CLOISTER_TEST_AGENTS="${agents:-}" CLOISTER_TEST_PASS="${CLOISTER_TEST_PASS:-}" \
        CLOISTER_TEST_VM="${vm:-}" CLOISTER_TEST_GUEST="${guest:-}" CLOISTER_TEST_SYSTEMD="${systemd:-}" CLOISTER_TEST_WHEEL="$fresh/wheel" \
        CLOISTER_SOAK_S="${CLOISTER_SOAK_S:-}" CLOISTER_BUILD_AUDIT="${CLOISTER_BUILD_AUDIT:-${CI:+required}}" \
        HYPOTHESIS_PROFILE="${HYPOTHESIS_PROFILE:-steady}" PYTHONDONTWRITEBYTECODE=1 \
        env -C "$source_dir" "$@"
}

# The same for the main job of a script. In the background, so that a signal to this script ends it at once instead
# of after it; with the default signal handling and the standard input that a background job would not have.
run_in_fresh() {
    in_fresh env --default-signal=INT,QUIT "$@" <&0 &
    job=$!
    wait "$job"
}

end_fresh() {
    local status=$?
    trap '' INT TERM HUP
    trap - EXIT
    # Jobs of root's that were not waited for.
    ((${#jobs[@]} == 0)) || kill -TERM "${jobs[@]}" 2>/dev/null || true
    if [[ -n ${second_uid:-} ]]; then
        pkill -KILL --uid "$second_uid" || true
        find /tmp /var/tmp /dev/shm -maxdepth 1 -uid "$second_uid" -exec rm -rf --one-file-system {} +
    fi
    if [[ -n ${uid:-} && $(id -u) == 0 ]]; then
        # What is started while we look is found by looking again, until none is left.
        local try left
        for try in {1..50}; do
            # A process whose parent has not collected it yet is no longer running, and goes with its parent.
            left=$(ps -U "$uid" -o pid=,stat= | awk '$2 !~ /^Z/ { print $1 }') || true
            [[ -n $left ]] || break
            [[ $try != 1 || $status -ge 128 ]] || say "processes were left behind, and are ended: $left"
            # shellcheck disable=SC2086  (a list of numbers)
            kill -KILL $left 2>/dev/null || true
            sleep 0.1
        done
        find /tmp /var/tmp /dev/shm -maxdepth 1 -uid "$uid" -exec rm -rf --one-file-system {} +
    elif [[ -n ${job:-} ]]; then
        kill -TERM "$job" 2>/dev/null && wait "$job" || true
    fi
    # Overlay file systems leave folders of mode 000, which only root can enter as they are.
    chmod -R u+rwX "$fresh" 2>/dev/null || true
    rm -rf --one-file-system "$fresh"
    exit "$status"
}

make_fresh() {
    environment=$("$root/tools/environment")
    jobs=()
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
    local site log
    as_user "$environment/bin/python" -m venv --without-pip "$fresh/venv"
    site=$("$fresh/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' |
        as_user tee "$site/dependencies.pth" >/dev/null
    log=$(in_fresh "$environment/bin/python" -m hatchling build --target wheel --directory "$fresh/wheel" 2>&1) ||
        fail "the wheel does not build: $log"
    in_fresh "$environment/bin/python" -m pip --python "$fresh/venv/bin/python" install --quiet \
        --disable-pip-version-check --no-deps --no-index "$fresh"/wheel/*.whl
}
