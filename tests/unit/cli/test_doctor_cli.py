"""`cloister doctor` shows findings so that a person can act on them."""

from __future__ import annotations

import pytest

from cloister.cli import doctor
from cloister.errors import UsageError
from cloister.runs.doctor import EVERY_RUN, Finding

BLOCKING = Finding(name="bubblewrap", state="missing", needed_for=EVERY_RUN, meaning="not there", remedy="apt-get x")
OPTIONAL = Finding(name="kvm", state="missing", needed_for="microvm", meaning="no\x1b[31m device", remedy="y " * 80)


def test_what_stops_every_run_is_loud():
    """MISSING is only what agents cannot run without; the verdict says so."""
    text = doctor.render((BLOCKING, OPTIONAL))
    assert "bubblewrap  MISSING  not there" in text
    assert "kvm         absent" in text
    assert text.endswith("agents cannot run here until what is MISSING is mended")
    assert doctor.render((OPTIONAL,)).endswith("agents can run here")


def test_remedies_stay_on_one_line():
    """A remedy can be copied whole, however long it is."""
    assert "try: " + OPTIONAL.remedy in doctor.render((OPTIONAL,))


def test_control_characters_are_shown_not_sent():
    """An error text of another program cannot colour or move the terminal."""
    assert "\x1b" not in doctor.render((OPTIONAL,))


def test_a_wrong_option_is_a_usage_error():
    """Wrong options end with 64, not with argparse's 2."""
    for argv in (["--nope"], ["extra"], ["--json=3"]):
        with pytest.raises(UsageError):
            doctor.main(argv)
