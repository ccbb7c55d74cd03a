# Root file systems of Debian and wheels for the Python in them: what the scripts that make test machines share.
# Sourced after common.sh, never run.
# shellcheck shell=bash
set -euo pipefail

as_root=()
[[ $(id -u) == 0 ]] || as_root=(sudo)

# What nothing in a test reads: a third of the size, and of the time.
debian_lean=(
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*'
    --dpkgopt='path-exclude=/usr/share/locale/*' --aptopt='Acquire::Languages "none"'
)

# This machine's Debian mirror; none on other distributions, for which mmdebstrap has a default.
debian_mirror() {
    apt-get indextargets --format '$(ORIGIN) $(REPO_URI)' 'Created-By: Packages' |
        awk '$1 == "Debian" && $2 !~ /security/ { print $2; exit }'
}

# Unpack a minimal system: suite, folder, packages joined by commas, then further options of mmdebstrap. Of a suite's
# backports it takes systemd and nothing else.
debian_root() {
    local suite=$1 folder=$2 packages=$3 base=${1%-backports}
    shift 3
    if [[ $suite != "$base" ]]; then
        # shellcheck disable=SC2016  ($1 is the folder, which mmdebstrap hands to the hook)
        set -- "$@" \
            --setup-hook="sed -n 's/ $base main/ $suite main/p' \"\$1/etc/apt/sources.list\" >\"\$1/etc/apt/sources.list.d/further.list\"" \
            --setup-hook="printf 'Package: src:systemd\\nPin: release n=$suite\\nPin-Priority: 990\\n' >\"\$1/etc/apt/preferences\""
    fi
    # shellcheck disable=SC2046  (one word, or none)
    "${as_root[@]}" mmdebstrap --quiet --mode=root --variant=minbase --include="$packages" "${debian_lean[@]}" "$@" \
        "$base" "$folder" $(debian_mirror) >&2
}

# Fetch what a lock file names, with its hashes, for the Python of a suite: suite, lock file, folder.
debian_wheels() {
    local python
    case $1 in
        bookworm*) python=3.11 ;;
        trixie*) python=3.13 ;;
        *) python=3.14 ;;
    esac
    "$environment/bin/python" -m pip download --quiet --disable-pip-version-check --require-hashes --no-deps \
        --only-binary :all: --python-version "$python" --implementation cp --platform "manylinux_2_28_$(uname -m)" \
        --platform "manylinux_2_17_$(uname -m)" --platform "manylinux2014_$(uname -m)" --dest "$3" -r "$2"
}
