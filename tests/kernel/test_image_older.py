"""Going back to an older version of an image, through the program and its broker."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cloister.host import image_keys
from cloister.host.image_store import SeenVersions
from support.cloister import User
from support.made_image import make

pytestmark = pytest.mark.kernel


def test_going_back_is_a_persons_word_and_on_record(tmp_path: Path, home: Path, workspace: Path) -> None:
    """Lowering the record is the broker's, and on record; what is not there or not trusted is not lowered."""
    user = User(home)
    try:
        for version in (3, 5):
            make(home / ".local/share/cloister/images", (), version=version)
        key = home / ".config/cloister/image-key/image-key.pem"
        image_keys.generate(str(key))
        public = image_keys.load(str(key)).public
        for version in ("3", "5"):
            assert user.run("image", "sign", "made", "--version", version, cwd=workspace).returncode == 0
        seen = SeenVersions(str(home / ".local/state/cloister/images/versions.json"))
        seen.note("made", public, 5)
        missing = user.run("image", "allow-older", "made", "4", cwd=workspace)
        assert (missing.returncode, "image-missing" in missing.stderr) == (64, True)
        done = user.run("image", "allow-older", "made", "3", "--json", cwd=workspace)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {"name": "made", "version": 3, "was": 5}
        assert seen.highest("made", public) == 3
        (event,) = [each for each in user.audited("policy.changed") if "image made" in each["message"]]
        assert "version 3" in event["message"]
        os.rename(key.parent, key.parent.with_name("away"))
        seen.note("made", public, 5)
        stranger = user.run("image", "allow-older", "made", "3", cwd=workspace)
        assert (stranger.returncode, "image-key-unknown" in stranger.stderr) == (77, True)
        assert seen.highest("made", public) == 5
    finally:
        user.close()
