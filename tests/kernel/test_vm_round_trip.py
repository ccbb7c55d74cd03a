"""Any workspace, changed by a guest into any other: reviewed and applied, the host has what the guest had."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import vm_disk_rig as rig
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.host import overlay_apply, vm_baseline
from cloister.host.overlay_apply import Permission
from cloister.host.overlay_review import open_review
from cloister.host.vm_hand_back import hand_back

pytestmark = pytest.mark.kernel

NAMES = st.sampled_from(["a", "b", "c", "d e", "f\n", "\udcff", ".git", "x" * 255])
FILES = st.one_of(
    st.binary(max_size=20).map(lambda data: ("file", data)),
    st.integers(1, 3).map(lambda size: ("file", bytes(size * 4096 - 1))),
    st.sampled_from(["a", "../a", "/etc/passwd", "y" * 70]).map(lambda target: ("link", target)),
)
TREES = st.recursive(
    st.dictionaries(NAMES, FILES, max_size=4),
    lambda below: st.dictionaries(NAMES, st.one_of(FILES, below), max_size=4),
    max_leaves=8,
)


def build(place: Path, tree: dict[str, Any]) -> None:
    """Make a tree on the host."""
    place.mkdir()
    for name, what in tree.items():
        path = place / name
        if isinstance(what, dict):
            build(path, what)
        elif what[0] == "link":
            path.symlink_to(what[1])
        else:
            path.write_bytes(what[1])


@given(before=TREES, after=TREES)
@settings(max_examples=25, deadline=None)
def test_any_change_arrives(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Files for directories, links for files, all gone or all new: nothing is missed and nothing is left over."""
    place = Path(tempfile.mkdtemp(prefix="cloister-trip."))
    try:
        root, guest = place / "root", place / "guest"
        build(root, before)
        build(guest, after)
        first, second = place / "first.img", place / "second.img"
        rig.fill(root, first)
        rig.fill(guest, second)  # what the guest's kernel would have made of the first
        os.rename(f"{first}{vm_baseline.SUFFIX}", f"{second}{vm_baseline.SUFFIX}")
        upper = place / "overlay/upper"
        hand_back(rig.tools(), str(second), str(upper), root=str(root))
        with open_review(str(root), str(upper), names=(), since_ns=time.time_ns() + 10**9) as review:
            outcomes = overlay_apply.apply(review, review.changes(), Permission(force=True, protected=True))
        assert {outcome.result for outcome in outcomes} <= {"applied"}, outcomes
        assert rig.on_host(root) == rig.on_host(guest)
    finally:
        shutil.rmtree(place)
