"""The table of kinds."""

from __future__ import annotations

from cloister.audit.kinds import kinds


def test_every_kind_says_what_it_is_to_others():
    """A kind has an OCSF class and activity, a severity from 1 to 5 and a name for people."""
    assert kinds()["process.executed"].class_uid == 1007
    for name, kind in kinds().items():
        assert name.count(".") == 1, name
        assert kind.class_uid == 0 or 1000 < kind.class_uid < 7000, name
        assert 1 <= kind.severity <= 5, name
        assert kind.name, name
