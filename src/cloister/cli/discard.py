"""`cloister discard`: throw changes of a run away."""

from __future__ import annotations

from cloister.cli import records
from cloister.cli.arguments import Parser
from cloister.runs import review


def parser() -> Parser:
    """Describe the verb."""
    verb = Parser(
        "discard",
        "Throw the changes of a run in overlay mode away.",
        prose="The workspace is not touched. The run's records and receipt stay.",
        examples=(("cloister discard last", "the newest run's changes"),),
    )
    verb.add_argument("run", metavar="RUN", help="id of a run, the beginning of one, or `last`")
    return verb


def main(argv: list[str]) -> int:
    """Remove the run's copy."""
    options = parser().read(argv)
    store = records.store()
    run = store.find(options.run)
    review.pending(store, run)  # the same questions as for `diff`: over, and something still there
    review.discard(store, run)
    print(f"the changes of run {run} are gone")
    return 0
