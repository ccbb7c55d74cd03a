"""Goldens of plans for microVMs: what a policy means today, as a diff to be read in review.

`PYTHONPATH=src:tests python tests/golden/test_vm_plans.py` writes them anew (tests themselves write nothing).
"""

from pathlib import Path

import msgspec
import pytest

from cloister.errors import UnsupportedError
from cloister.images.manifest import Manifest, Part, Verity
from cloister.plan import render
from cloister.plan.steps import Limit, Plan
from cloister.plan.vm import FIRST_FILE, number_of
from cloister.plan.vm_snapshot import Memory, Snapshot
from cloister.plan.vm_template import Shape
from cloister.plan.workspace import Mount, WorkspaceLayout
from cloister.policy.document import read
from cloister.policy.merge import resolve
from cloister.policy.presets import builtin_presets
from cloister.runs.compile import CarriedPath, Facts
from cloister.runs.compile_vm import VmFacts, compile_vm, image_of
from cloister.runs.explain import Explainer, Seen
from cloister.runs.explain_vm import guest_mounts
from cloister.runs.limits import Means
from cloister.runs.vm_shape import COLD

FOLDER = Path(__file__).parent / "vm_plans"
POLICIES = sorted(path.stem for path in FOLDER.glob("*.toml"))
LAYOUT = WorkspaceLayout(
    root="/home/me/src/p",
    mounts=(
        Mount("bind", "/home/me/src/p", "/home/me/src/p"),
        Mount("ro", "/home/me/src/p/.git/hooks", "/home/me/src/p/.git/hooks"),
        Mount("mask", "/home/me/src/p/.env"),
    ),
    placeholders=(),
)
MANIFEST = Manifest(
    name="dev", version=3, arch="x86_64", created=1, kernel=Part(sha256="a" * 64, size=1), kernel_release="6.1",
    initramfs=Part(sha256="b" * 64, size=1), protocol=1, recipe="c" * 64, packages="d" * 64,
    root=Verity(data_blocks=10, hash_start=11, root_hash="e" * 64, salt="f" * 64, size=4096),
    cmdline="console=ttyS0 quiet {clock} cloister.verity={verity}",
)  # fmt: skip
MACHINE = VmFacts(
    manifest=MANIFEST, directory="/images/dev/3", monitor="qemu", program="/usr/bin/qemu-system-x86_64",
    accelerator="tcg", clock_khz=2_000_000, machine="x86_64", secrets=("/home/me/.claude/.credentials.json",),
)  # fmt: skip


def _facts(**changes: object) -> Facts:
    values: dict[str, object] = {
        "run": "0123456789ab", "agent_name": "agent", "policy_digest": "0" * 64, "uid": 4242, "gid": 4242, "user": "me",
        "home": "/home/me", "state": "/home/me/.local/state/cloister/agents/agent/0011223344556677",
        "run_state": "/home/me/.local/state/cloister/runs/0123456789ab",
        "run_runtime": "/run/user/4242/cloister/runs/0123456789ab", "shim": "/usr/lib/cloister/cloister-shim",
        "bubblewrap": "/usr/bin/bwrap", "etc_directory": "", "merged_usr": True, "landlock_abi": 7,
        "directory": "/home/me/src/p", "layout": LAYOUT, "limit_means": Means("scope", ("memory", "pids", "cpu")),
        "carried": (CarriedPath(".claude/CLAUDE.md", "/home/me/.claude/CLAUDE.md", "file"),),
    }  # fmt: skip
    return Facts(**(values | changes))  # type: ignore[arg-type]


def _plan(text: bytes, *, machine: VmFacts = MACHINE, **changes: object) -> Plan:
    resolved = resolve(read(text, "cloister.toml"), "agent", presets=builtin_presets())
    allow = tuple(str(entry) for entry in resolved.agent.egress.allow)
    return compile_vm(resolved.agent, resolved.preset, resolved.agent.command, allow, _facts(**changes), machine)


def _of_table(table: str, machine: VmFacts = MACHINE) -> Plan:
    text = b'schema = 1\n[agents.agent]\ncommand = ["tool"]\nisolation = "microvm"\n'
    return _plan(text + table.encode(), machine=machine)


def _compiled(name: str) -> str:
    return render.as_json(_plan((FOLDER / f"{name}.toml").read_bytes())).decode()


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_still_means_this_plan(name: str) -> None:
    """The compiled plan is the stored one, to the byte."""
    assert _compiled(name) == (FOLDER / f"{name}.plan.json").read_text(encoding="utf-8")


def test_no_path_of_the_home_or_workspace_is_in_the_jail() -> None:
    """The monitor's jail shows the system, the run's box, its own directory and our helper, and has no network."""
    plan = _of_table("")
    argv = plan.launch.argv
    sources = {argv[at + 1] for at, word in enumerate(argv) if word.startswith(("--ro-bind", "--bind", "--dev-bind"))}
    runtime = "/run/user/4242/cloister/runs/0123456789ab"

    assert sources == {"/usr", "/etc/ld.so.cache", "/usr/lib/cloister/cloister-shim", f"{runtime}/box", f"{runtime}/vm"}
    assert {"--unshare-net", "--unshare-pid", "--disable-userns", "--seccomp"} <= set(argv)
    assert argv[argv.index("--cap-drop") + 1] == "ALL"


def test_kvm_is_the_only_device_and_only_where_it_works() -> None:
    """With TCG no device of the host is in the jail; with KVM /dev/kvm is."""
    resolved = resolve(read((FOLDER / "shell.toml").read_bytes(), "x"), "agent", presets=builtin_presets())
    fast = VmFacts(**{name: getattr(MACHINE, name) for name in MACHINE.__struct_fields__} | {"accelerator": "kvm"})
    plan = compile_vm(resolved.agent, resolved.preset, ("true",), (), _facts(), fast)

    assert "/dev/kvm" in plan.launch.argv
    assert "/dev/kvm" not in _of_table("").launch.argv


def test_the_agents_filter_is_loaded_in_the_guest() -> None:
    """The plan writes the filter into the box, and the inner half in the guest is told to load it."""
    plan = _of_table("")
    vm = plan.launch.vm

    assert vm is not None
    assert "/run/cloister/box/seccomp.bpf" in vm.inner
    assert any(getattr(step, "path", "").endswith("/box/seccomp.bpf") for step in plan.steps)


def test_the_program_is_looked_for_in_the_guest() -> None:
    """The command keeps its bare name: the host's PATH says nothing about an image."""
    assert _of_table("").launch.command == ("tool",)


REFUSED = {
    '[agents.agent.egress]\nmode = "internet"': "microvm-internet",
    '[agents.agent.filesystem]\nread = ["/srv/data"]': "microvm-path",
    '[agents.agent.filesystem]\nwrite = ["/srv/data"]': "microvm-path",
    '[agents.agent.microvm]\nmemory = "64M"': "microvm-memory",
    "[agents.agent.microvm]\nports = [80, 80]": "microvm-ports",
    "[agents.agent.unit]\nio_weight = 10": "policy-not-enforceable",
}


@pytest.mark.parametrize(("table", "reference"), REFUSED.items(), ids=list(REFUSED.values()))
def test_what_a_guest_cannot_keep_is_refused(table: str, reference: str) -> None:
    """A key that nothing would enforce stops the run and is named; without it there is a plan."""
    with pytest.raises(UnsupportedError) as caught:
        _of_table(table)

    assert caught.value.reference == reference
    assert _of_table("").isolation == "microvm"


def test_a_monitor_of_roots_has_a_number_of_its_own() -> None:
    """It takes that on in the jail, which has no user namespace then; what it needs of the run's is open to it.

    Other runs of the same policy have other numbers; a user's monitor has the user's, and opens nothing to anybody.
    """
    text = (
        b'schema = 1\n[agents.agent]\ncommand = ["tool"]\nisolation = "microvm"\n'
        b'[agents.agent.identity]\naudiences = ["cloister"]\n'
    )
    numbered = msgspec.structs.replace(MACHINE, groups=(44, 55))
    plans = {run: _plan(text, machine=numbered, uid=0, gid=0, run=run) for run in ("0123456789ab", "0123456789ac")}
    argv = plans["0123456789ab"].launch.argv
    number = number_of("0123456789ab")
    keeper = argv.index("keeper") - 1

    assert argv[keeper - 6 : keeper] == ("/run/cloister/shim", "as", str(number), "44", "55", "--")
    assert "--unshare-user" not in argv
    assert [argv[place + 1] for place, word in enumerate(argv) if word == "--cap-add"] == ["CAP_SETUID", "CAP_SETGID"]
    assert len({plan.launch.vm.monitor_uid for plan in plans.values() if plan.launch.vm}) == len(plans)
    assert f"its monitor is user {number}" in render.as_text(plans["0123456789ab"])

    modes = {
        step.path.rpartition("/")[2]: step.mode
        for step in plans["0123456789ab"].steps
        if hasattr(step, "path") and hasattr(step, "mode")
    }
    own = _plan(text, uid=4242)
    theirs = {
        step.path.rpartition("/")[2]: step.mode for step in own.steps if hasattr(step, "path") and hasattr(step, "mode")
    }
    assert (modes["0123456789ab"], modes["box"], modes["egress.sock"]) == (0o700, 0o755, 0o666)
    assert not any(mode & 0o077 for mode in theirs.values())
    assert "as" not in own.launch.argv


def test_the_monitor_is_held_where_a_policy_bounds_its_guest() -> None:
    """With a bound of memory or processors, or with `enforce`, in a cgroup where this host gives one, and said so.

    Else it is not said to be in one; who insists on a cgroup starts nothing without.
    """
    given = Means("cgroup", ("cpu", "memory", "pids"), "/sys/fs/cgroup/mine")
    bound, insists = {"memory_max": '"512M"'}, {"enforce": '"cgroup"'}
    plans = {
        "scope": _of(bound), "given": _of(bound, limit_means=given), "quota": _of({"cpu_quota": '"50%"'}),
        "insists": _of(insists), "no cgroup": _of(bound, limit_means=Means()), "no bound": _of({}),
    }  # fmt: skip
    steps = {name: [step for step in plan.steps if isinstance(step, Limit)] for name, plan in plans.items()}
    said = {name: [words for words in plan.limits if "cgroup" in words] for name, plan in plans.items()}

    assert [step.values() for step in steps["scope"]] == [{"memory.max": str(1024 << 20), "pids.max": "512"}]
    assert "cgroup /sys/fs/cgroup/mine/cloister-0123456789ab:" in steps["given"][0].describe()
    assert [step.values()["cpu.max"] for step in steps["quota"]] == ["50000 100000"]
    assert steps["no cgroup"] == steps["no bound"] == []
    assert said == {
        "scope": ["monitor 1024 MiB, 512 tasks: cgroup (systemd scope)"],
        "given": ["monitor 1024 MiB, 512 tasks: cgroup"],
        "quota": ["monitor 1536 MiB, 512 tasks: cgroup (systemd scope)",
                  "cpu_quota 50%: cgroup (systemd scope), of the monitor"],
        "insists": ["monitor 1536 MiB, 512 tasks: cgroup (systemd scope)"], "no cgroup": [], "no bound": [],
    }  # fmt: skip
    with pytest.raises(UnsupportedError, match="cgroup"):
        _of(insists, limit_means=Means())


def _of(limits: dict[str, str], **changes: object) -> Plan:
    """Return a plan with these limits, on a host with these facts."""
    table = "".join(f"{name} = {value}\n" for name, value in limits.items())
    head = b'schema = 1\n[agents.agent]\ncommand = ["tool"]\nisolation = "microvm"\n[agents.agent.limits]\n'
    return _plan(head + table.encode(), **changes)


def test_the_smaller_of_two_memories_counts() -> None:
    """A policy's `memory_max` bounds the guest, whatever its own table says; the monitor's cgroup is larger."""
    plan = _of_table('[agents.agent.limits]\nmemory_max = "512M"\n[agents.agent.microvm]\nmemory = "2G"')
    scope = next(step for step in plan.steps if getattr(step, "memory_bytes", None))

    assert plan.launch.vm is not None
    assert plan.launch.vm.memory_mib == 512
    assert "512M" in plan.launch.argv
    assert getattr(scope, "memory_bytes", 0) > 512 << 20


def test_ports_follow_the_files_in_the_jail() -> None:
    """A published port's listener is the descriptor behind the machine's files."""
    plan = _of_table("[agents.agent.microvm]\nports = [18789, 18790]")
    vm, argv = plan.launch.vm, plan.launch.argv
    assert vm is not None
    behind = FIRST_FILE + len(vm.files)

    assert [argv[at + 1] for at, word in enumerate(argv) if word == "--publish"] == [
        f"{behind}:18789", f"{behind + 1}:18790"]  # fmt: skip


def test_a_warm_start_keeps_to_everything_that_a_cold_one_does() -> None:
    """From a template the monitor's argv says what it says without: only memory and its loading are added.

    So are its jail and what the guest is told; a tap lies behind the template's files, and ports behind the tap.
    """
    table = (
        '[agents.agent.microvm]\nmemory = "512M"\ncpus = 2\ndisk_rate = "1M"\nnetwork = "bridge"\nports = [18789]\n'
        '[agents.agent.limits]\ntasks_max = 99\ndisk_max = "1G"\n'
    )
    warm = msgspec.structs.replace(MACHINE, template=("/templates/key", "0" * 64))
    plans = [_of_table(table, machine).launch for machine in (MACHINE, warm)]
    cold_vm, warm_vm = plans[0].vm, plans[1].vm
    assert cold_vm is not None
    assert warm_vm is not None
    behind = FIRST_FILE + len(warm_vm.files)

    assert [word for word in plans[1].argv if word not in plans[0].argv] == [
        f"{behind + 1}:18789", "microvm,auto-kernel-cmdline=off,memory-backend=memory",
        "memory-backend-file,id=memory,size=512M,mem-path=/proc/self/fd/10,share=off",
        "socket,id=orders,fd=12", "-mon",
        "chardev=orders,mode=control", "-incoming", "defer", f"tap,id=net,fd={behind}",
    ]  # fmt: skip
    assert [word for word in plans[0].argv if word not in plans[1].argv] == [
        f"{behind - 2}:18789", "microvm,auto-kernel-cmdline=off", f"tap,id=net,fd={behind - 3}",
    ]  # fmt: skip
    assert (cold_vm.fields, cold_vm.inner) == (warm_vm.fields, warm_vm.inner)


def test_a_start_from_memory_keeps_to_everything_that_a_cold_one_does() -> None:
    """What goes on from a memory has the run's card, tap, ports, limits and jail: only the loading is added."""
    table = (
        '[agents.agent.microvm]\nmemory = "512M"\ncpus = 2\ndisk_rate = "1M"\nnetwork = "bridge"\nports = [18789]\n'
        '[agents.agent.limits]\ntasks_max = 99\ndisk_max = "1G"\n'
    )
    shape = Shape(image="dev", version=3, manifest="0" * 64, program="q", accelerator="tcg", host="1" * 64,
                  memory_mib=512, cpus=2, card=True, machine="2" * 64)  # fmt: skip
    memory = Memory(shape=shape, named=False, commands=41, pty=False, findings=(), inside={}, placeholders={})
    kept = Snapshot(name="one", run="r", agent="agent", profile="", workspace="w", asked=(), image="dev", version=3,
                    manifest="0" * 64, made=1.0, paused_s=0.1, fields=(), disks=(), memory=memory)  # fmt: skip
    living = msgspec.structs.replace(MACHINE, snapshot="one", kept=kept, kept_in="/snapshots/one")
    cold, warm = (_of_table(table, machine).launch for machine in (MACHINE, living))
    assert warm.vm is not None
    behind = FIRST_FILE + len(warm.vm.files)

    assert [word for word in warm.argv if word not in cold.argv] == [
        f"{behind + 1}:18789", "--adopt", "41", "socket,id=orders,fd=11", "-mon", "chardev=orders,mode=control",
        "-incoming", "defer", f"tap,id=net,fd={behind}",
    ]  # fmt: skip
    assert [word for word in cold.argv if word not in warm.argv] == [
        f"{behind - 1}:18789",
        f"tap,id=net,fd={behind - 2}",
    ]


def test_a_machine_of_firecracker_has_what_it_is_kept_into() -> None:
    """Two files more than one of QEMU's, behind what it starts from; a kept one has the run's jail, and adopts."""
    shape = Shape(image="dev", version=3, manifest="0" * 64, program="f", accelerator="kvm", host="1" * 64,
                  memory_mib=512, cpus=1, machine="2" * 64)  # fmt: skip
    memory = Memory(shape=shape, named=False, commands=7, pty=False, findings=(), inside={}, placeholders={})
    kept = Snapshot(name="one", run="r", agent="agent", profile="", workspace="w", asked=(), image="dev", version=3,
                    manifest="0" * 64, made=1.0, paused_s=0.1, fields=(), disks=(), memory=memory)  # fmt: skip
    cold = msgspec.structs.replace(MACHINE, monitor="firecracker", program="/usr/bin/firecracker", accelerator="kvm")
    warm = msgspec.structs.replace(cold, template=("/templates/key", "0" * 64))
    living = msgspec.structs.replace(cold, snapshot="one", kept=kept, kept_in="/snapshots/one")
    launches = [_of_table("", machine).launch for machine in (cold, warm, living)]
    given = [[(file.role, file.path) for file in one.vm.files[COLD:]] for one in launches if one.vm]
    out = [("memory-out", ""), ("state-out", "")]

    assert given == [
        out,
        [("memory", "/templates/key/memory"), ("state", "/templates/key/state"), *out],
        [("memory", "/snapshots/one/memory"), ("state", "/snapshots/one/state"), *out],
    ]
    assert launches[1].argv == launches[0].argv
    assert [word for word in launches[2].argv if word not in launches[0].argv] == ["--adopt", "7"]


@pytest.mark.parametrize(("preset", "image"), [("claude", "claude"), ("pi", "pi"), ("shell", "dev"), ("", "dev")])
def test_a_preset_names_its_image(preset: str, image: str) -> None:
    """Without an image in the policy it is the preset's, else `dev`; the policy's own word wins."""
    text = f'schema = 1\n[agents.agent]\npreset = "{preset}"\ncommand = ["x"]\n'
    own = f'{text}[agents.agent.microvm]\nimage = "mine"\n'
    found = [resolve(read(one.encode(), "x"), "agent", presets=builtin_presets()) for one in (text, own)]

    assert [image_of(one.agent, one.preset) for one in found] == [image, "mine"]


def test_explain_knows_a_guest() -> None:
    """The home is fresh, the workspace a copy with its protections, programs are the image's, nothing else is there."""
    plan = _of_table("")
    explainer = Explainer(plan, lambda _: Seen("file", "", True, True), guest_mounts(plan, LAYOUT))

    def answer(path: str) -> str:
        access = explainer.ask(path)
        return "".join(letter for letter, on in zip("rw", (access.readable, access.writable), strict=True) if on)

    assert answer("/home/me/src/p/file") == "rw"
    assert answer("/workspace/file") == "rw"
    assert answer("/home/me/src/p/.git/hooks/x") == "r"
    assert answer("/home/me/src/p/.env") == ""
    assert answer("/usr/bin/env") == "r"
    assert answer("/srv/secret") == ""
    assert answer("/home/me/.ssh/id") == "w"


def test_the_text_shows_the_machine() -> None:
    """`cloister plan` names image, files, what the guest is told, copies and ports."""
    text = render.as_text(_plan((FOLDER / "claude.toml").read_bytes()))

    assert "virtual machine of image dev 3 by qemu (tcg): 2048 MiB, 2 CPU" in text
    assert "127.0.0.1:18789 of this host leads to 127.0.0.1:18789 of the guest" in text
    assert "/home/me/.claude/CLAUDE.md as ~/.claude/CLAUDE.md" in text


if __name__ == "__main__":
    for one in POLICIES:
        (FOLDER / f"{one}.plan.json").write_text(_compiled(one), encoding="utf-8")
