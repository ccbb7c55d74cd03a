"""The probe tells the truth about this machine, and the doctor says agents can run here."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import bubblewrapped
import msgspec
import pytest

from cloister.host import probe, programs
from cloister.plan.facts import HostFacts, Program

pytestmark = pytest.mark.kernel


def test_the_cheap_probe_starts_nothing(monkeypatch):
    """`probe` starts no program, agrees with uname, and takes milliseconds."""
    monkeypatch.setattr(subprocess, "run", None)
    probe.probe()
    started = time.perf_counter()
    facts = probe.probe()
    assert time.perf_counter() - started < 0.05
    assert (facts.kernel, facts.arch, facts.uid) == (os.uname().release, os.uname().machine, os.geteuid())
    assert {facts.namespaces.works, facts.overlay.works, facts.kvm.works} == {"unknown"}


def test_facts_survive_the_receipt():
    """Facts written to JSON read back as the same facts."""
    facts = probe.probe()
    assert msgspec.json.decode(msgspec.json.encode(facts), type=HostFacts) == facts


@pytest.mark.parametrize("arguments", [["--json"], ["--json", "--quick"]])
def test_the_doctor_as_an_ordinary_user(arguments):
    """On this machine a user without privileges has namespaces, seccomp and bubblewrap, tried or read."""
    code = f"import sys; from cloister.cli.doctor import main; sys.exit(main({arguments!r}))"
    done = bubblewrapped.outside(code)
    assert done.returncode in {0, 69}, done.stderr
    report = json.loads(done.stdout)
    states = {finding["name"]: finding["state"] for finding in report["findings"]}
    assert states["bubblewrap"] == states["seccomp"] == "ok"
    assert states["namespaces"] == ("degraded" if "--quick" in arguments else "ok"), report
    assert states["user"] == "ok"
    assert done.returncode == (0 if report["can_run"] else 69)


def test_a_bubblewrap_that_fails_is_told_in_its_own_words(tmp_path):
    """The namespace trial passes on what bubblewrap says, and a hanging one ends at the time limit."""
    assert probe._try_namespaces("/usr/bin/bwrap").works == "yes"
    failing = tmp_path / "bwrap"
    failing.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
    failing.chmod(0o755)
    assert probe._try_namespaces(str(failing)).reason == "bwrap: setting up uid map: Permission denied"


def test_a_trial_that_hangs_is_ended(tmp_path, monkeypatch):
    """No answer within the limit is a no, and nothing is left running."""
    monkeypatch.setattr(probe, "TRIAL_LIMIT_S", 0.3)
    hanging = tmp_path / "bwrap"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    found = probe._try_namespaces(str(hanging))
    assert found.works == "no"
    assert "no answer" in found.reason


def test_overlay_trial_leaves_nothing():
    """The overlay trial answers, and its layers are on no file system that remains."""
    before = sorted(os.listdir("/tmp"))
    assert probe._try("overlay").works in {"yes", "no"}
    assert not {"lower", "upper", "work", "merged"} & (set(os.listdir("/tmp")) - set(before))


def test_kvm_trial_ends_with_an_answer():
    """A guest that halts too late, a device that is not there or not ours: always one line, never a hang."""
    found = probe._try("kvm")
    assert found.works in {"yes", "no"}
    assert found.works == "yes" or found.reason


@pytest.mark.root
def test_programs_that_others_can_change_are_not_used(tmp_path):
    """A planted program is named and not used; the same one, closed to others, is."""
    place = Path("/run") / f"cloister-test-{os.getpid()}"
    place.mkdir(mode=0o755)
    planted = place / "cloister-no-such-program"
    try:
        planted.write_text("#!/bin/sh\n")
        planted.chmod(0o755)
        assert programs.find(planted.name, f"relative:{place}") == Program(path=str(planted))
        planted.chmod(0o775)
        assert programs.find(planted.name, str(place)) == Program(refused=str(planted))
        planted.chmod(0o755)
        os.chown(planted, bubblewrapped.ORDINARY, -1)
        assert programs.find(planted.name, str(place)).refused
        os.chown(planted, 0, -1)
        place.chmod(0o777)
        assert programs.find(planted.name, str(place)).refused
        link = tmp_path / "cloister-no-such-link"
        link.symlink_to(planted)
        assert programs.find(link.name, str(tmp_path)).refused
    finally:
        planted.unlink()
        place.rmdir()


def test_a_link_stays_a_link():
    """Programs that go by their name (pasta is passt) keep it."""
    found = programs.find("pasta", "")
    assert not found.path or Path(found.path).name == "pasta"
