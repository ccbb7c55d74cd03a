"""Refusals, in the form in which clients stop or wait as they should."""

import json

from cloister.llm import errors
from cloister.llm.errors import Refusal
from cloister.llm.routes import Shape

SPENT = Refusal(429, "tokens-per-day", "out of budget", 3600, again=False)
BUSY = Refusal(429, "requests-per-minute", "too many", 7)
NO_MODEL = Refusal(403, errors.NO_MODEL, "not here", again=False)


def parts(shape: Shape, refusal: Refusal) -> tuple[int, bytes, dict[str, object]]:
    """Return status, head and error of a response at the wall time 1000."""
    head, _, body = errors.response(shape, refusal, now=1000.5).partition(b"\r\n\r\n")
    return int(head.split()[1]), head, json.loads(body)["error"]


def test_codex_is_told_when_a_budget_begins_anew() -> None:
    """Clients of Responses get the type that ends their turn, and a time; others keep the protocol's own type."""
    status, head, error = parts("responses", SPENT)

    assert (status, error["type"], error["resets_at"]) == (429, "usage_limit_reached", 4600)
    assert error["code"] == "tokens-per-day"
    assert b"x-cloister-reason: tokens-per-day" in head
    assert parts("chat", SPENT)[2]["type"] == "rate_limit_error"
    assert parts("anthropic", SPENT)[2]["type"] == "rate_limit_error"


def test_what_may_be_tried_again_says_so() -> None:
    """The twin: a limit that frees itself in seconds is no end, in any protocol."""
    shapes: tuple[Shape, ...] = ("anthropic", "chat", "responses")
    for shape in shapes:
        status, head, error = parts(shape, BUSY)
        assert (status, error["type"]) == (429, "rate_limit_error")
        assert b"retry-after: 7" in head
        assert b"x-should-retry" not in head


def test_a_model_that_is_not_allowed_is_not_found_for_codex() -> None:
    """It sends any 403 again; a 404 with the code of OpenAI ends with our words."""
    status, head, error = parts("responses", NO_MODEL)

    assert (status, error["code"], error["message"]) == (404, "model_not_found", "cloister: not here")
    assert b"x-cloister-reason: model-not-allowed" in head
    assert parts("chat", NO_MODEL)[0] == parts("anthropic", NO_MODEL)[0] == 403
