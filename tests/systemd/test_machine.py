"""The machines themselves: what is promised to those who test with them."""

from pathlib import Path

from support.machines import Machine


def test_it_boots_into_a_running_system(machine: Machine) -> None:
    """PID 1 is the suite's systemd, and no unit has failed."""
    assert machine.version == {"bookworm": 252, "trixie": 257}[machine.suite]
    assert machine.run(["systemctl", "is-system-running"], check=False).stdout.strip() == "running", machine.run(
        ["systemctl", "--failed", "--no-legend"]
    ).stdout


def test_cloister_is_installed_for_everybody_and_is_roots(machine: Machine) -> None:
    """Alice can call it, and nothing on the way to it is anybody's but root's."""
    assert "cloister" in machine.run(["cloister", "--version"], user="alice").stdout
    assert machine.python("import cloister, os; print(os.getuid())", user="alice").stdout == "1000\n"
    path = Path("/opt/cloister/bin/cloister")
    for folder in [path, *path.parents]:
        told = machine.path(str(folder)).stat()
        assert told.st_uid == 0
        assert not told.st_mode & 0o022
