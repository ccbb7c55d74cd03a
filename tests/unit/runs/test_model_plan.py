"""What a plan says of models."""

from __future__ import annotations

from cloister.policy.model import Llm, Provider
from cloister.runs.model_plan import planned_models

PROVIDERS = {
    "one": Provider(key="file:~/one.key"),
    "local": Provider(protocol="openai-responses", base_url="http://127.0.0.1:11434/v1", auth="none"),
    "strange": Provider(key="file:~/strange.key"),
}


def test_a_plan_names_providers_models_limits_and_variables():
    """Everything that decides about a call is shown: where it goes, by which key, what bounds it."""
    llm = Llm(
        providers=("one", "local"), models=("claude-*",), aliases={"fast": "claude-haiku-4-5"},
        tokens_per_day=2_000_000, cost_per_day_usd=2.5, fallback=True, redact_secrets=True, on_exhausted="ask",
    )  # fmt: skip

    assert planned_models(llm, PROVIDERS, ("CLOISTER_MODEL_KEY", "ANTHROPIC_AUTH_TOKEN")) == (
        "one: anthropic at https://api.anthropic.com; key file:~/one.key",
        "local: openai-responses at http://127.0.0.1:11434/v1; key none",
        "models: claude-*",
        "aliases: fast is claude-haiku-4-5",
        "limits: requests_per_minute 60, tokens_per_day 2000000, cost_per_day_usd 2.5",
        "also: fallback, redact_secrets, a used-up budget is asked about",
        "placeholder in CLOISTER_MODEL_KEY, ANTHROPIC_AUTH_TOKEN",
    )


def test_every_limit_of_the_policy_is_shown():
    """A limit that is added to the policy cannot be forgotten here."""
    numbers = [name for name in Llm.__struct_fields__ if name.endswith(("_minute", "_run", "_day", "_month", "_usd"))]
    for name in (*numbers, "concurrency", "max_tokens"):
        shown = planned_models(Llm(**{"providers": ("one",), name: 7}), PROVIDERS, ())
        assert any(f"{name} 7" in line for line in shown), name


def test_without_providers_there_is_nothing_to_show():
    """A run without models has no such part in its plan."""
    assert planned_models(Llm(), PROVIDERS, ("X",)) == ()
