"""Where the system's broker keeps things."""

from __future__ import annotations

from cloister.runs.unit_prepare import system_paths


def test_answers_of_people_are_state_not_configuration() -> None:
    """The system's configuration is root's: nothing that the system's broker writes lies there."""
    paths = system_paths()
    assert paths.policy == "/etc/cloister/cloister.toml"
    for place in (paths.decisions, paths.blocked, paths.runs, paths.logins):
        assert place.startswith("/var/lib/cloister/proxy/")
    assert paths.run_runtime("x") == "/run/cloister/proxy/runs/x"
