"""One live run: what the broker does between `launch` and the receipt.

Frames from the two halves of the shim come in, frames go out; the order is the state machine
drawn here. Sockets and timers belong to the broker (`services/`), which passes them in.

    starting ──P ok──▶ probed ──R──▶ running ──E──▶ ending ──W──▶ finished
        └──────P bad, Y, time, stop, a half died──────┘

Whatever happens, `on_finished` is called once; its owner undoes the plan, writes the receipt,
and then has the outer half told its exit code (`say_goodbye`).
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from typing import Protocol

from cloister.plan.steps import Plan

KILL_AFTER_S = 10.0
"""Time between asking the agent to end and ending it."""
LAUNCH_TIMEOUT_S = 30.0
"""Time in which the sandbox must come up; generous, for a loaded machine."""
GUEST_TIMEOUT_S = 180.0
"""Time in which a virtual machine must: without hardware for it, on a loaded machine, it takes many times its 1.3 s."""
KILLED_S = 2.0
"""Time in which a killed sandbox is gone; nothing waits longer for it."""
GUEST_KILLED_S = 10.0
"""The same for a guest, which has two seconds of it to unmount its disks before its monitor is killed."""
_ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
EXIT_TIMEOUT = 124
EXIT_FAILED = 125
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127


class Peer(Protocol):
    """One half of the shim, as seen from here."""

    def send(self, kind: str, payload: bytes = b"", descriptors: tuple[int, ...] = ()) -> None:
        """Queue one frame."""

    def hear(self) -> None:
        """Take in, now, what the other end has said already."""

    def close(self) -> None:
        """Close the channel."""


class Timer(Protocol):
    """What `loop.call_later` returns."""

    def cancel(self) -> None:
        """Forget it."""


class Outcome:
    """How a run ended: exit code for the caller, a word for the record, a text for people."""

    def __init__(self, code: int, reason: str, text: str = "") -> None:
        """Keep the three parts."""
        self.code = code
        self.reason = reason
        self.text = text


class LiveRun:
    """The state machine of one run. `on_finished` is called once, with the outcome."""

    def __init__(  # noqa: PLR0913  # made in one place, by name
        self,
        plan: Plan,
        outer: Peer,
        inner: Peer,
        call_later: Callable[[float, Callable[[], None]], Timer],
        on_finished: Callable[[Outcome], None],
        on_running: Callable[[], None] = lambda: None,
    ) -> None:
        """Take the plan, both peers, the clock of the loop, and whom to tell."""
        self.plan = plan
        self.outer = outer
        self.inner = inner
        self.probe: tuple[str, ...] = ()
        self.status = "starting"
        self._call_later = call_later
        self._on_finished = on_finished
        self._on_running = on_running
        self._outcome: Outcome | None = None
        self._done = False
        self._killed_s = GUEST_KILLED_S if plan.launch.vm else KILLED_S
        self._launch_s = GUEST_TIMEOUT_S if plan.launch.vm else LAUNCH_TIMEOUT_S
        self._timers = [call_later(self._launch_s, self._launch_timeout)]

    # --- what the inner half says -------------------------------------------------------

    def probed(self, results: tuple[str, ...]) -> None:
        """The self-probe's results: the inner half refuses by itself; here they are kept for the receipt."""
        self.probe = results

    def refuse(self, reference: str, message: str, where: list[str]) -> None:
        """End the run for a reason found from outside."""
        lines = [f"cloister: {message}, so the run was ended [{reference}]", *(f"  where: {line}" for line in where)]
        self._decide(Outcome(EXIT_FAILED, reference, "\n".join([*lines, "  try: again"])))
        self._kill()

    def machine_died(self, reference: str, text: str) -> None:
        """The virtual machine ended, or was ended, with the agent in it; its end is told in a moment."""
        self._decide(Outcome(EXIT_FAILED, reference, text))

    def running(self) -> None:
        """The agent has control: from now on its own time counts."""
        self.status = "running"
        self._cancel_timers()
        runtime_s = self.plan.launch.runtime_s
        if runtime_s is not None:
            self._timers.append(self._call_later(runtime_s, self._runtime_over))
        self._on_running()

    def failed(self, number: int, stage: str) -> None:
        """The agent could not be started."""
        vm = self.plan.launch.vm
        image = f"{vm.image} {vm.version}" if vm else ""
        self._decide(start_failure(self.plan.launch.command[0], number, stage, image))

    def exited(self, status: int) -> None:
        """The agent ended by itself or by a signal (128+n)."""
        self._decide(Outcome(status, "exited"))

    def stopped(self) -> None:
        """Ctrl-Z inside: the caller's shell shall see the whole run stop."""
        self.outer.send("T")

    def inner_closed(self) -> None:
        """PID 1 is gone, and the kernel with it ends everything inside."""
        if self.status == "starting":  # by a signal to the caller and all around it, of which the caller has told
            self.outer.hear()
        if self._done:
            return
        if "verdict=failed" in self.probe and self.status == "starting":
            self._decide(Outcome(EXIT_FAILED, "probe-failed", _probe_text(self.probe)))
        elif self._outcome is None:
            # Killed from outside, or bubblewrap failed before it began: its own words are on stderr.
            self._decide(_died())
        self._kill_later(KILLED_S)

    # --- what the outer half says -------------------------------------------------------

    def signal(self, number: int) -> None:
        """The caller got a signal: pass it on to the agent. While there is none yet, it ends the run."""
        if self.status == "starting" and number in _ENDING:
            self._decide(Outcome(128 + number, "stopped"))
            self._kill()
            return
        self.inner.send("S", bytes([number]))

    def continued(self) -> None:
        """The caller's shell let the run go on (fg)."""
        self.inner.send("S", bytes([signal.SIGCONT]))

    def sandbox_ended(self) -> None:
        """Bubblewrap was reaped: nothing lives in the sandbox any more.

        Its first process ended before it did. A busy loop may get to this word first: the agent's own end counts.
        """
        self.inner.hear()
        if self._outcome is None and self.status == "running":
            self._decide(_died())  # the word of its first process's end is on the way
        elif self._outcome is None:
            text = "cloister: the sandbox could not be set up [sandbox-failed]\n  try: cloister doctor"
            self._decide(Outcome(EXIT_FAILED, "sandbox-failed", text))
        self._finish()

    def outer_closed(self) -> None:
        """The caller died; so does the run."""
        self._decide(Outcome(128 + signal.SIGKILL, "client-died"))
        self.inner.send("K")
        self._finish()

    # --- what the owner says --------------------------------------------------------------

    def stop(self, grace_s: float = KILL_AFTER_S) -> None:
        """Ask the agent to end, and end it when it does not."""
        if self.status == "starting" and self.plan.launch.vm:
            self._decide(Outcome(128 + signal.SIGTERM, "stopped"))
            self._kill()
            return
        self.inner.send("S", bytes([signal.SIGTERM]))
        self.inner.send("S", bytes([signal.SIGCONT]))  # a stopped agent could not hear it
        self._kill_later(grace_s, Outcome(128 + signal.SIGKILL, "stopped"))

    def network_failed(self, why: str) -> None:
        """The run has no network of its own, or no more: nobody shall take the silence for an empty internet."""
        text = f"cloister: {why} [network-failed]\n  try: cloister doctor"
        self._decide(Outcome(EXIT_FAILED, "network-failed", text))
        self._kill()

    # --- endings --------------------------------------------------------------------------

    def _decide(self, outcome: Outcome) -> None:
        """The first outcome counts."""
        if self._outcome is None:
            self._outcome = outcome
            self.status = "ending"

    def _finish(self) -> None:
        if self._done:
            return
        self._done = True
        self._cancel_timers()
        self.inner.close()
        outcome = self._outcome or Outcome(EXIT_FAILED, "unknown")
        self._on_finished(outcome)

    def say_goodbye(self, outcome: Outcome, warnings: tuple[str, ...] = ()) -> None:
        """Tell the outer half its exit code, when everything is undone and on record."""
        lines = [outcome.text] if outcome.text else []
        lines += [f"cloister: {warning}" for warning in warnings]
        text = "".join(f"{line}\n" for line in lines)
        self.outer.send("F", bytes([outcome.code & 255]) + text.encode("utf-8", "backslashreplace"))
        self.outer.close()

    def _runtime_over(self) -> None:
        limit = self.plan.launch.runtime_s
        self._decide(
            Outcome(EXIT_TIMEOUT, "timed-out", f"cloister: ended after {limit:g} s, its runtime_max [timed-out]")
        )
        self.stop()

    def _launch_timeout(self) -> None:
        text = f"cloister: the sandbox did not come up within {self._launch_s:g} s [launch-timeout]"
        self._decide(Outcome(EXIT_FAILED, "launch-timeout", text))
        self._kill()

    def _kill_later(self, delay_s: float, outcome: Outcome | None = None) -> None:
        def now() -> None:
            if outcome:
                self._decide(outcome)
            self._kill()

        self._timers.append(self._call_later(delay_s, now))

    def _kill(self) -> None:
        """End PID 1; when even that shows no effect, undo anyway and let the outer half kill bubblewrap."""
        self.inner.send("K")
        self._timers.append(self._call_later(self._killed_s, self._finish))

    def _cancel_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()


def start_failure(command: str, number: int, stage: str, image: str = "") -> Outcome:
    """Return how a failed start is told: env(1)'s 126 and 127 where `execve` failed, 125 for what comes before.

    `image` is the guest's, where the program is that of an image: it lacks what this host has.
    """
    text = f"cloister: {command}: {os.strerror(number)}"
    if stage != "exec":
        return Outcome(EXIT_FAILED, "not-started", f"{text} (while preparing: {stage}) [start-failed]")
    missing = number in (errno.ENOENT, errno.ENOTDIR)
    if missing and image and "/" not in command:
        text = f"cloister: the guest image {image} has no program named {command!r} [program-not-found]"
        remedy = "  try: an image that has it, in microvm.image (cloister image list, cloister image list --recipes)"
        return Outcome(EXIT_NOT_FOUND, "not-started", f"{text}\n{remedy}")
    return Outcome(EXIT_NOT_FOUND if missing else EXIT_NOT_EXECUTABLE, "not-started", f"{text} [exec-failed]")


def _died() -> Outcome:
    """Return the end of a sandbox that somebody else has ended."""
    text = "cloister: the sandbox ended before the agent did [sandbox-died]\n  try: cloister doctor"
    return Outcome(EXIT_FAILED, "sandbox-died", text)


def _probe_text(probe: tuple[str, ...]) -> str:
    lines = ["cloister: the sandbox does not hold, so the agent was not started [probe-failed]"]
    lines += [f"  where: {result}" for result in probe]
    return "\n".join([*lines, "  try: cloister doctor"])
