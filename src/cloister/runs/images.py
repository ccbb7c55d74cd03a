"""Guest images of one user: where they lie, whose signature counts, and building one from start to end.

The user's store and trusted keys come with the system's: an image of the user's own store wins over one of the system's
with the same name. Facts come in as arguments, as everywhere below `cli`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from importlib import resources
from typing import NamedTuple

from cloister.errors import UsageError
from cloister.host import image_keys
from cloister.host.image_build import Order, build, renew
from cloister.host.image_jail import Say
from cloister.host.image_open import OpenedImage, Trust, changed, open_image, read_manifest
from cloister.host.image_packages import KeptPackages
from cloister.host.image_place import build_place
from cloister.host.image_root import sources
from cloister.host.image_store import LOCK, MAX_SMALL, SIGNATURE, ImageStore, SeenVersions
from cloister.host.image_verify import verify_root
from cloister.host.probe import SHIM
from cloister.images import recipe as recipes
from cloister.images.lock import Lock, decode
from cloister.images.manifest import Manifest
from cloister.images.recipe import Recipe
from cloister.images.trust import MAX_BYTES, TrustedKey, parse_signatures, signature_line
from cloister.policy.model import Images
from cloister.runs.paths import Paths
from cloister.runs.store import Store
from cloister.runs.workspaces import expand

SYSTEM_STORE = "/var/lib/cloister/images"
SYSTEM_TRUST = "/etc/cloister/trust.d"
_MAX_RECIPE = 16 << 20
"""Characters of a recipe or of the lock beside it."""


class ImagePlaces(NamedTuple):
    """Where everything about images is, for one user."""

    store: str
    """The user's own images."""
    key: str
    """The user's own private key; its public line is `key` with `.pub`."""
    trust: str
    """The user's trusted keys."""
    seen: str
    """The highest version used of each image."""
    system_store: str = SYSTEM_STORE
    system_trust: str = SYSTEM_TRUST


def places(environ: Mapping[str, str], paths: Paths, policy: Images) -> ImagePlaces:
    """Return them; `images.store` of the policy says where one's own are, else XDG_DATA_HOME."""
    data = environ.get("XDG_DATA_HOME", "")
    base = data.rstrip("/") if data.startswith("/") else f"{paths.home}/.local/share"
    return ImagePlaces(
        store=expand((policy.store,), paths.home)[0] if policy.store else f"{base}/cloister/images",
        key=f"{paths.config}/image-key/image-key.pem",
        trust=f"{paths.config}/trust.d",
        seen=f"{paths.state}/images/versions.json",
    )


def stores(where: ImagePlaces) -> tuple[ImageStore, ImageStore]:
    """Return the user's store and the system's, in the order in which an image is looked for."""
    return ImageStore(where.store), ImageStore(where.system_store)


def kept_packages(where: ImagePlaces) -> KeptPackages:
    """Return where the packages of the user's own images are kept: in their store, by a name that no image has."""
    return KeptPackages(f"{where.store}/.packages")


def store_of(where: ImagePlaces, name: str) -> ImageStore:
    """Return the store that has an image of this name, the user's if none has."""
    found = stores(where)
    return next((store for store in found if store.versions(name)), found[0])


def trust_of(where: ImagePlaces, policy: Images, uid: int) -> Trust:
    """Return whose images count: keys of the policy, of both trust stores, and the user's own.

    Raises:
        DeniedError: `image-trust-file`: a trust store cannot be believed.
    """
    keys = [TrustedKey(public.lower(), "images.trust of the policy") for public in policy.trust]
    keys += image_keys.trust_store(where.system_trust, frozenset({0}))
    keys += image_keys.trust_store(where.trust, frozenset({0, uid}))
    keys += image_keys.trust_store(os.path.dirname(where.key), frozenset({uid}))
    return Trust(tuple(keys), policy.require_signature)


def open_for_run(  # noqa: PLR0913  # each decides by itself
    where: ImagePlaces, policy: Images, name: str, *, uid: int, manifest: str = "", version: int | None = None
) -> OpenedImage:
    """Verify and open an image for a run; raises like `open_image`.

    Args:
        where: the user's places.
        policy: the table `images`.
        name: of the image.
        uid: the user.
        manifest: the digest from the plan, when there is one already.
        version: that of the plan; the newest if none is given.
    """
    trusted = trust_of(where, policy, uid)
    seen = SeenVersions(where.seen)
    return open_image(store_of(where, name), name, trusted, version=version, seen=seen, manifest=manifest)


class Found(NamedTuple):
    """A recipe, and what lies beside it."""

    recipe: Recipe
    npm_lock: str = ""


def find_recipe(word: str) -> Found:
    """Return the recipe in a file, or the shipped one of that name.

    Raises:
        UsageError: `recipe-missing`.
        PolicyError: it has mistakes.
    """
    if "/" in word or word.endswith(".toml"):
        recipe = recipes.load(_text(word), word)
        beside = os.path.join(os.path.dirname(word), recipe.npm_lock) if recipe.npm_lock else ""
        return Found(recipe, _text(beside) if beside else "")
    shipped = shipped_recipes()
    if word not in shipped:
        import difflib

        close = difflib.get_close_matches(word, shipped, n=1)
        remedy = f"cloister image build {close[0]}" if close else f"one of: {', '.join(shipped)}; or a file"
        raise UsageError("recipe-missing", f"there is no recipe {word}", remedy=remedy)
    recipe = recipes.load(shipped[word], f"{word}.toml")
    folder = resources.files("cloister.images") / "recipes"
    return Found(recipe, (folder / recipe.npm_lock).read_text(encoding="utf-8") if recipe.npm_lock else "")


def _text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(_MAX_RECIPE)
    except OSError as error:
        message = f"the recipe, or what lies beside it, cannot be read: {error.strerror}"
        raise UsageError("recipe-missing", message, where=path, remedy="cloister image list --recipes") from error


def shipped_recipes() -> dict[str, str]:
    """Return the recipes that come with Cloister, by name."""
    folder = resources.files("cloister.images") / "recipes"
    files = sorted((each for each in folder.iterdir() if each.name.endswith(".toml")), key=lambda each: each.name)
    return {each.name.removesuffix(".toml"): each.read_text(encoding="utf-8") for each in files}


class Built(NamedTuple):
    """What a build made."""

    path: str
    manifest: Manifest
    signer: str
    """The public key that signed it; empty for nobody."""


class Builder:
    """Makes versions of images, signed with the user's key, in the user's store."""

    def __init__(
        self, where: ImagePlaces, say: Say, *, ask: image_keys.AskPassphrase | None = None, sign: bool = True
    ) -> None:
        """Load the key before any work, or make it where there is none.

        Raises:
            CloisterError: as loading the key.
        """
        self._where, self._say = where, say
        self.store = ImageStore(where.store)
        self._key: image_keys.ImageKey | None = None
        if sign:
            if not os.path.lexists(where.key):
                say("making a key to sign images with")
                image_keys.generate(where.key, comment="made by the first build")
            self._key = image_keys.load(where.key, ask)

    def build(self, found: Found, *, version: int | None = None, locked: Lock | None = None) -> Built:
        """Build an image from a recipe; the version is the next one if none is given.

        Raises:
            CloisterError: as `image_build.build`, and `image-version-exists`.
            OSError: something cannot be written.
        """
        recipe = found.recipe
        kept = kept_packages(self._where)
        order = Order(self._version(recipe.name, version), str(SHIM), recipe, locked, found.npm_lock, kept)
        self.store.refuse_existing(recipe.name, order.version)
        with self.store.making() as made, build_place(made) as place:
            return self._put(made, build(order, place, made, sources(recipe.suite), self._say))

    def renew(self, name: str, policy: Images, uid: int, *, version: int | None = None) -> Built:
        """Make a version of an image with this Cloister's own program in it; the packages stay what they are.

        Raises:
            CloisterError: the older version is not there, or not trusted.
            OSError: something cannot be written.
        """
        old_store = store_of(self._where, name)
        with open_image(old_store, name, trust_of(self._where, policy, uid)) as old, self.store.making() as work:
            number = self._version(name, version)
            return self._put(work, renew(number, str(SHIM), old.manifest, old.path, work))

    def _version(self, name: str, version: int | None) -> int:
        if version is not None:
            return version
        return max((each for store in stores(self._where) for each in store.versions(name)), default=0) + 1

    def _put(self, work: str, manifest: Manifest) -> Built:
        if self._key:
            with open(f"{work}/{SIGNATURE}", "w", encoding="ascii") as file:
                file.write(signature_line(self._key.public, self._key.sign(manifest.canonical())))
        return Built(self.store.put(work, manifest), manifest, self._key.public if self._key else "")


class Looked(NamedTuple):
    """What is known of an image without reading its large files."""

    path: str
    manifest: Manifest
    signer: TrustedKey | None
    lock: Lock


def look(where: ImagePlaces, trusted: Trust, name: str, version: int | None = None) -> Looked:
    """Return manifest, signer and lock of an image.

    Raises:
        CloisterError: there is none, or it is not trusted, or its lock is not the one that was signed.
    """
    path = store_of(where, name).path(name, version)
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        manifest, signer = read_manifest(directory, path, name, trusted)
    finally:
        os.close(directory)
    try:
        with open(f"{path}/{LOCK}", "rb") as file:
            data = file.read(MAX_SMALL)
        lock = decode(data)
    except (OSError, ValueError) as error:
        raise changed(path, f"its lock cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != manifest.packages:
        raise changed(path, "its lock is another")
    return Looked(path, manifest, signer, lock)


def sign_image(where: ImagePlaces, name: str, version: int | None, key: image_keys.ImageKey) -> tuple[Manifest, str]:
    """Sign an image of the user's store whose bytes are those of its manifest; return the manifest and the public key.

    Raises:
        CloisterError: there is none, or it was changed: nobody signs what does not boot.
        OSError: the signature cannot be written.
    """
    store = ImageStore(where.store)
    path = store.path(name, version)
    own = Trust((TrustedKey(key.public, "the key that signs"),), required=False)
    with open_image(store, name, own, version=int(os.path.basename(path))) as opened:
        verify_root(opened)
        manifest = opened.manifest
    with open(f"{path}/{SIGNATURE}", "rb") as file:
        others = [one for one in parse_signatures(file.read(MAX_BYTES)) if one.public != key.public]
    lines = [signature_line(one.public, one.value) for one in others]
    lines.append(signature_line(key.public, key.sign(manifest.canonical())))
    store.replace_signatures(path, "".join(lines).encode())
    return manifest, key.public


def collect_images(
    where: ImagePlaces, records: Store, living: frozenset[str] | None, *, keep: int, dry_run: bool
) -> list[str]:
    """Remove all but the newest versions from the user's store, and those that living runs use; return the paths.

    With them go the packages that no image's lock names any more.

    Raises:
        CloisterError, OSError: something could not be removed.
    """
    store = ImageStore(where.store)
    used = _used(records, living)
    gone = [] if dry_run else store.clean()
    for name in store.names():
        for version in store.versions(name)[:-keep]:
            if (name, version) not in used:
                gone.append(f"{store.directory}/{name}/{version}")
                if not dry_run:
                    store.remove(name, version)
    left = [_lock_in(one.path) for one in store.stored() if one.path not in gone]
    if None not in left:  # else nobody knows which packages are needed
        gone += kept_packages(where).collect([lock for lock in left if lock], dry_run=dry_run)
    return gone


def _lock_in(path: str) -> Lock | None:
    """Return the lock in an image's directory; None where it cannot be read."""
    try:
        with open(f"{path}/{LOCK}", "rb") as file:
            return decode(file.read(MAX_SMALL))
    except (OSError, ValueError):
        return None


def _used(records: Store, living: frozenset[str] | None) -> set[tuple[str, int]]:
    """Return the images of runs that live; without a broker nothing does."""
    found: set[tuple[str, int]] = set()
    for run in living or ():
        plan = records.plan(run)
        vm = plan.launch.vm if plan else None
        if vm:
            found.add((vm.image, vm.version))
    return found
