"""The state machine of a run, with both halves of the shim and the clock played by the test."""

from collections.abc import Callable

import pytest

from cloister.plan.steps import Launch, Plan
from cloister.plan.vm import VmLaunch
from cloister.runs.live import GUEST_KILLED_S, KILL_AFTER_S, LAUNCH_TIMEOUT_S, LiveRun, Outcome, start_failure


class Half:
    """One half of the shim: remembers what it was told."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.heard: list[tuple[str, bytes]] = []
        self.closed = False
        self.unread: Callable[[], None] = lambda: None

    def send(self, kind: str, payload: bytes = b"", descriptors: tuple[int, ...] = ()) -> None:
        """Remember a frame."""
        assert not descriptors
        self.heard.append((kind, payload))

    def hear(self) -> None:
        """Say what has not been read yet."""
        self.unread()

    def close(self) -> None:
        """Remember that."""
        self.closed = True


class Clock:
    """Timers that the test lets run out."""

    def __init__(self) -> None:
        """No timers."""
        self.timers: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, delay_s: float, call: Callable[[], None]) -> "Clock.Timer":
        """Keep a timer."""
        entry = (delay_s, call)
        self.timers.append(entry)
        return Clock.Timer(self, entry)

    def pass_time(self, delay_s: float) -> None:
        """Let the timers of exactly this delay run out."""
        for entry in [entry for entry in self.timers if entry[0] == delay_s]:
            self.timers.remove(entry)
            entry[1]()

    class Timer:
        """One timer."""

        def __init__(self, clock: "Clock", entry: tuple[float, Callable[[], None]]) -> None:
            """Remember it."""
            self.clock, self.entry = clock, entry

        def cancel(self) -> None:
            """Forget it."""
            if self.entry in self.clock.timers:
                self.clock.timers.remove(self.entry)


class Play:
    """A run and everything around it."""

    def __init__(self, runtime_s: float | None = None) -> None:
        """Begin: launched, nothing heard."""
        launch = Launch(argv=("bwrap",), command=("agent",), directory="/w", environment={}, runtime_s=runtime_s)
        plan = Plan(
            run="0123456789ab", agent="a", preset="", isolation="namespace", workspace="/w", policy_digest="d",
            steps=(launch,),
        )  # fmt: skip
        self.outer, self.inner, self.clock = Half(), Half(), Clock()
        self.outcomes: list[Outcome] = []
        self.live = LiveRun(plan, self.outer, self.inner, self.clock.call_later, self.outcomes.append)

    @property
    def end(self) -> tuple[int, str]:
        """The one outcome."""
        assert len(self.outcomes) == 1
        return self.outcomes[0].code, self.outcomes[0].reason


def test_a_quiet_run_ends_with_the_agents_code() -> None:
    """Probe, running, exited, sandbox reaped: the agent's own code, once."""
    play = Play()
    play.live.probed(("verdict=passed",))
    play.live.running()
    play.live.exited(7)
    play.live.inner_closed()
    play.live.sandbox_ended()
    play.live.outer_closed()

    assert play.end == (7, "exited")
    assert play.inner.closed
    assert play.clock.timers == []


def test_a_failed_probe_is_125_and_names_what_failed() -> None:
    """The sandbox that does not hold runs nothing."""
    play = Play()
    play.live.probed(("write:/usr=allowed", "verdict=failed"))
    play.live.inner_closed()
    play.live.sandbox_ended()

    assert play.end == (125, "probe-failed")
    assert "write:/usr=allowed" in play.outcomes[0].text


def test_an_inner_half_that_dies_before_the_agent_is_125() -> None:
    """No exit code of the agent's may be made up."""
    play = Play()
    play.live.inner_closed()
    play.live.sandbox_ended()

    assert play.end == (125, "sandbox-died")


def test_bubblewrap_killed_under_a_running_agent_is_told_as_that() -> None:
    """The word of its end may come before that of the first process: the sandbox died, it was not badly set up."""
    play = Play()
    play.live.running()
    play.live.sandbox_ended()
    play.live.inner_closed()

    assert play.end == (125, "sandbox-died")


def test_an_agents_end_counts_when_bubblewraps_is_read_first() -> None:
    """Both have come while the loop was busy: the exit code of the agent is on record, not a sandbox that died."""
    play = Play()
    play.live.running()
    play.inner.unread = lambda: play.live.exited(9)
    play.live.sandbox_ended()

    assert play.end == (9, "exited")


def test_bubblewrap_that_never_starts_is_125() -> None:
    """Its own words are on standard error; ours say where to look."""
    play = Play()
    play.live.sandbox_ended()

    assert play.end == (125, "sandbox-failed")


def test_a_client_that_dies_takes_the_run_along() -> None:
    """The inner half is told to kill, and the record says who died."""
    play = Play()
    play.live.running()
    play.live.outer_closed()

    assert play.end == (137, "client-died")
    assert ("K", b"") in play.inner.heard


def test_runtime_over_is_124_even_when_the_agent_then_exits() -> None:
    """The first outcome counts; the agent is asked first, then killed."""
    play = Play(runtime_s=60.0)
    play.live.running()
    play.clock.pass_time(60.0)
    asked = list(play.inner.heard)
    play.live.exited(0)
    play.live.sandbox_ended()

    assert asked == [("S", b"\x0f"), ("S", b"\x12")]
    assert play.end == (124, "timed-out")


def test_an_agent_that_ignores_the_request_is_killed() -> None:
    """After the grace comes the kill; when even that shows no effect, the run ends all the same."""
    play = Play()
    play.live.running()
    play.live.stop()
    play.clock.pass_time(KILL_AFTER_S)
    killed = list(play.inner.heard)
    play.clock.pass_time(2.0)

    assert ("K", b"") in killed
    assert play.end == (137, "stopped")


def test_a_stopped_agent_that_exits_in_time_keeps_its_code() -> None:
    """`cloister stop` lets an agent end in its own way."""
    play = Play()
    play.live.running()
    play.live.stop()
    play.live.exited(3)
    play.live.sandbox_ended()

    assert play.end == (3, "exited")


def test_a_sandbox_that_does_not_come_up_is_given_up() -> None:
    """A start has a time limit; a running agent has not."""
    stuck, runs = Play(), Play()
    stuck.clock.pass_time(LAUNCH_TIMEOUT_S)
    stuck.clock.pass_time(2.0)
    runs.live.running()
    runs.clock.pass_time(LAUNCH_TIMEOUT_S)

    assert stuck.end == (125, "launch-timeout")
    assert runs.outcomes == []


def test_a_guest_that_boots_is_ended_by_the_callers_signal() -> None:
    """There is no agent to hear Ctrl-C yet, and a boot takes a while: the run ends at once, in time for its disks."""
    vm = VmLaunch(
        image="i", version=1, manifest="0", monitor="qemu", accelerator="tcg", memory_mib=1, cpus=1, files=(),
        fields=(), inner=(), directory="/x", disk_bytes=1,
    )  # fmt: skip
    launch = Launch(argv=("bwrap",), command=("x",), directory="/", environment={}, vm=vm)
    plan = Plan(run="r", agent="a", preset="", isolation="microvm", workspace="", policy_digest="", steps=(launch,))
    ends: list[Outcome] = []
    outer, inner, clock = Half(), Half(), Clock()
    live = LiveRun(plan, outer, inner, clock.call_later, ends.append)
    live.signal(28)
    live.signal(2)
    clock.pass_time(GUEST_KILLED_S)

    assert [kind for kind, _ in inner.heard] == ["S", "K"]
    assert [(end.code, end.reason) for end in ends] == [(130, "stopped")]


def test_signals_and_job_control_are_passed_on() -> None:
    """The caller's signals go in, Ctrl-Z comes out, and `fg` goes in again."""
    play = Play()
    play.live.running()
    play.live.signal(15)
    play.live.stopped()
    play.live.continued()

    assert play.inner.heard == [("S", b"\x0f"), ("S", b"\x12")]
    assert play.outer.heard == [("T", b"")]


def test_goodbye_carries_code_text_and_warnings() -> None:
    """The outer half's last frame: one byte of code, then words for people."""
    play = Play()
    play.live.say_goodbye(Outcome(125, "x", "cloister: broken [x]"), ("look here",))

    assert play.outer.heard == [("F", b"}cloister: broken [x]\ncloister: look here\n")]
    assert play.outer.closed


@pytest.mark.parametrize(
    ("number", "stage", "code"),
    [(2, "exec", 127), (20, "exec", 127), (13, "exec", 126), (8, "exec", 126), (2, "chdir", 125), (1, "rlimit", 125)],
)
def test_a_start_that_fails_speaks_as_env_does(number: int, stage: str, code: int) -> None:
    """127 not found, 126 cannot be executed, 125 for everything that is ours."""
    assert start_failure("agent", number, stage).code == code
