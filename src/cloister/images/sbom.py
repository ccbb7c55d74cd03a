"""What an image consists of, as SPDX 2.3 JSON (https://spdx.github.io/spdx-spec/v2.3): for scanners and auditors. Pure.

Made from lock and manifest only, so it is as reproducible as they are. Package URLs follow
https://github.com/package-url/purl-spec.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from urllib.parse import quote

from cloister.images.lock import Lock, Package
from cloister.images.manifest import Manifest

_NOT_ID = re.compile(r"[^A-Za-z0-9.-]")


def spdx(lock: Lock, manifest: Manifest) -> bytes:
    """Return the document."""
    image = "SPDXRef-image"
    packages = [_image(manifest, image)]
    relations = [_relation("SPDXRef-DOCUMENT", "DESCRIBES", image)]
    for package in lock.packages:
        entry = _package(package, lock.suite)
        packages.append(entry)
        relations.append(_relation(image, "CONTAINS", str(entry["SPDXID"])))
    created = dt.datetime.fromtimestamp(manifest.created, dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    document = {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": f"{manifest.name}-{manifest.version}",
        "documentNamespace": f"urn:cloister:image:{manifest.name}:{manifest.version}:{lock.digest()}",
        "creationInfo": {"created": created, "creators": ["Tool: cloister"]},
        "packages": packages,
        "relationships": relations,
    }
    return json.dumps(document, indent=1, sort_keys=True).encode() + b"\n"


def _image(manifest: Manifest, identifier: str) -> dict[str, object]:
    return {
        "SPDXID": identifier, "name": manifest.name, "versionInfo": str(manifest.version),
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": False, "primaryPackagePurpose": "OPERATING-SYSTEM",
    }  # fmt: skip


def _package(package: Package, suite: str) -> dict[str, object]:
    words = [package.kind, package.name, package.version, package.arch]
    entry: dict[str, object] = {
        "SPDXID": "SPDXRef-" + _NOT_ID.sub("-", "-".join(word for word in words if word)),
        "name": package.name, "versionInfo": package.version, "downloadLocation": "NOASSERTION", "filesAnalyzed": False,
        "externalRefs": [{"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl",
                          "referenceLocator": _purl(package, suite)}],
    }  # fmt: skip
    if re.fullmatch(r"[0-9a-f]{64}", package.sha256):
        entry["checksums"] = [{"algorithm": "SHA256", "checksumValue": package.sha256}]
    return entry


def _purl(package: Package, suite: str) -> str:
    version = quote(package.version, safe=".-~+")
    if package.kind in {"deb", "kernel"}:
        return f"pkg:deb/debian/{quote(package.name, safe='.-+')}@{version}?arch={package.arch}&distro={suite}"
    kind = {"npm": "npm", "pip": "pypi"}[package.kind]
    return f"pkg:{kind}/{quote(package.name, safe='/.-')}@{version}"


def _relation(one: str, how: str, other: str) -> dict[str, str]:
    return {"spdxElementId": one, "relationshipType": how, "relatedSpdxElement": other}
