"""Loading the packet filter of the bridge, with the guests that are on it, and saying whether it is still that.

The text (`egress/nft_bridge.py`) stands in a file and names no guest: those are elements, made here from the records.
As for the accounts' filter, what a listing must look like is found out by loading the text into a network namespace of
its own; elements are compared with the records. Root only; nothing is decided here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any

from cloister.errors import CloisterError, StepError
from cloister.host import firewall, private_files
from cloister.plan.bridge import EXPECTED, FILE, PLACE, TABLE, Tap

FAMILIES = ("bridge", "inet")
_MAX_BYTES = 1 << 20
_DELETE = "".join(f"table {family} {TABLE} {{}}\ndelete table {family} {TABLE}\n" for family in FAMILIES)
Elements = dict[tuple[str, str], set[tuple[str, ...]]]


def elements(taps: Iterable[Tap], gateway: str = "") -> Elements:
    """Return what must stand in the sets, by family and set."""
    found: Elements = {(family, name): set() for family, name in _SETS}
    if gateway:
        found["inet", "gateways"].add((gateway,))
    for one in taps:
        port = str(one.port)
        found["bridge", "talks"].add((one.name, one.mac, one.address, one.gateway, port))
        found["bridge", "knows"].add((one.name, one.mac, one.mac, one.address, one.gateway))
        found["inet", "reaches"].add((one.address, one.gateway, port))
        found["inet", "listeners"].add((str(one.uid), one.gateway, port))
    return found


def add(tap: Tap) -> None:
    """Let one guest through, in one transaction.

    Raises:
        StepError: nft refuses.
    """
    _change("add", elements((tap,)))


def remove(tap: Tap, others: Iterable[Tap] = ()) -> None:
    """Take one guest out, but for what others have as well.

    Raises:
        StepError: nft refuses: the filter is not there, or has no such guest.
    """
    kept = elements(others)
    _change("delete", {place: found - kept[place] for place, found in elements((tap,)).items()})


def load(taps: Iterable[Tap], gateway: str) -> None:
    """Load the file and all guests, in one transaction, and compare.

    Raises:
        StepError: there is no such file of root's alone, or the kernel has something else afterwards.
        UnsupportedError: there is no nft that can be trusted.
    """
    wanted = tuple(taps)
    text = _text()
    firewall.run_nft(text + _commands("add", elements(wanted, gateway)).encode())
    if why := trouble(wanted, gateway):
        raise StepError("bridge-filter-not-loaded", why, where=FILE, remedy="sudo cloister apply")


def unload() -> None:
    """Take both tables away.

    Raises:
        StepError: the kernel refuses.
    """
    firewall.run_nft(_DELETE.encode())


def trouble(taps: Iterable[Tap], gateway: str) -> str:
    """Return in one sentence what is wrong with the kernel's tables; empty when they are what they should be."""
    try:
        listed = [item for family in FAMILIES for item in _listing(family)]
        shape, there = _shape(listed), _elements(listed)
        wanted = _noted(_text()) or _apart(_text())
    except CloisterError as error:
        return str(error)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"the packet filter of the bridge cannot be looked at: {error!r}"
    if shape != wanted:
        return "the packet filter of the bridge is not what Cloister has loaded"
    if there != elements(taps, gateway):
        return "the packet filter of the bridge knows other guests than there are"
    return ""


def expect() -> None:
    """Note what a listing must look like, for those that may make no network namespace.

    Raises:
        StepError: there is no file, or nft does not take it.
        OSError: it cannot be noted.
    """
    text = _text()
    if _noted(text) is None:
        os.makedirs(PLACE, mode=0o755, exist_ok=True)
        private_files.replace(EXPECTED, f"{firewall.key(text)} {_apart(text)}\n".encode())


_SETS = (
    ("bridge", "talks"), ("bridge", "knows"), ("inet", "reaches"), ("inet", "listeners"), ("inet", "gateways"),
)  # fmt: skip


def _change(verb: str, what: Elements) -> None:
    firewall.run_nft(_commands(verb, what).encode())


def _commands(verb: str, what: Elements) -> str:
    lines = []
    for (family, name), found in what.items():
        if found:
            body = ", ".join(" . ".join(_quoted(family, part) for part in element) for element in sorted(found))
            lines.append(f"{verb} element {family} {TABLE} {name} {{ {body} }}\n")
    return "".join(lines)


def _quoted(family: str, part: str) -> str:
    return f'"{part}"' if family == "bridge" and part.isalnum() and not part.isdecimal() else part


def _text() -> bytes:
    text = private_files.read(FILE, _MAX_BYTES)
    if text is None:
        raise StepError(
            "bridge-filter-missing", "there is no packet filter of the bridge that only root could have written",
            where=FILE, remedy="sudo cloister apply",
        )  # fmt: skip
    return text


def _noted(text: bytes) -> str | None:
    noted = (private_files.read(EXPECTED) or b"").decode("ascii", "replace").split()
    return noted[-1] if noted[:-1] == [firewall.key(text)] else None


def _apart(text: bytes) -> str:
    tables = [["list", "table", family, TABLE] for family in FAMILIES]
    return _shape([item for out in firewall.listed_apart(text, tables) for item in _items(out)])


def _listing(family: str) -> list[dict[str, Any]]:
    return _items(firewall.list_table(family, TABLE))


def _items(listed: bytes) -> list[dict[str, Any]]:
    return [item for item in json.loads(listed)["nftables"] if "metainfo" not in item]


def _shape(items: list[dict[str, Any]]) -> str:
    """Return a digest of tables without their elements."""
    bare = [
        {"set": {key: value for key, value in item["set"].items() if key != "elem"}} if "set" in item else item
        for item in items
    ]
    packed = hashlib.sha256()
    for family in FAMILIES:
        part = [item for item in bare if next(iter(item.values())).get("family") == family]
        packed.update(firewall.digest(json.dumps({"nftables": part}).encode()).encode())
    return packed.hexdigest()


def _elements(items: list[dict[str, Any]]) -> Elements:
    found: Elements = {}
    for item in items:
        if "set" in item:
            one = item["set"]
            found[one["family"], one["name"]] = {_parts(element) for element in one.get("elem", [])}
    return found


def _parts(element: Any) -> tuple[str, ...]:
    return tuple(str(part) for part in element["concat"]) if isinstance(element, dict) else (str(element),)
