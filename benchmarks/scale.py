"""Whether a policy of a thousand agents costs anything where it is used."""

from __future__ import annotations

from benchmarks.figures import compare, interleave
from benchmarks.report import Section
from benchmarks.world import AGENT, World

AGENTS = 1000
TARGET_MS = 50.0
PLAN, RUN = "cloister plan", "cloister run"


def scale(rounds: int) -> list[Section]:
    """`plan` (reads the policy each time) and `run` (the broker has read it) with 1 agent and with 1,000."""
    few = World("few")
    head = "schema = 1\n\n" + AGENT.format(name="shell")
    many = World("many", head + "".join("\n" + AGENT.format(name=f"a{number}") for number in range(AGENTS - 1)))
    try:
        cases = {
            f"{verb}, {count}": world.timed(["cloister", *words])
            for verb, words in ((PLAN, ("plan", "shell")), (RUN, ("run", "shell", "--", "true")))
            for count, world in (("1 agent", few), (f"{AGENTS:,} agents", many))
        }
        samples = interleave(cases, rounds)
    finally:
        few.close()
        many.close()
    plans = compare({name: values for name, values in samples.items() if name.startswith(PLAN)}, f"{PLAN}, 1 agent")
    runs = compare({name: values for name, values in samples.items() if name.startswith(RUN)}, f"{RUN}, 1 agent")
    more = plans[1].minimum - plans[0].minimum
    verdict = "Met" if more <= TARGET_MS else "Missed"
    return [
        Section(
            "A policy of 1,000 agents", "ms", plans,
            "`cloister plan` starts Python and reads the whole policy each time.",
            f"a thousand agents add ≤ {TARGET_MS:g} ms", f"{verdict}: {more:.0f} ms.",
        ),
        Section(
            "The same, hot", "ms", runs, "The broker reads a policy again only when it has changed.",
            "the hot path does not depend on the number", f"It takes {runs[1].ratio_of_minima:.2f} times as long.",
        ),
    ]  # fmt: skip
