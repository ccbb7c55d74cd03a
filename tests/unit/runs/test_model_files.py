"""Files that tell a product of a run's models: what stands in them, and when they are written."""

import json

import pytest

from cloister.policy.model import Preset
from cloister.policy.presets import builtin_presets
from cloister.runs.model_files import model_files

PRESET = Preset(
    schema=1,
    model_providers={
        "anthropic": ('"a": {"url": "{base_url}"}', '"named": {"models": {models}}'),
        "openai": ('"o": {"url": "{base_url}"}',),
    },
    model_files={"list.json": '{"providers": {{providers}}}', "default.json": '{"use": "{protocol}/{model}"}'},
)


def test_a_run_without_models_gets_none() -> None:
    """No protocol is served: no file, whatever the policy names."""
    assert not list(model_files(PRESET, (), ("m",)))


def test_providers_are_those_of_the_protocols_that_are_served() -> None:
    """Each has the base URL of its protocol; the first protocol and the first model are the default."""
    files = {name: json.loads(text) for name, text in model_files(PRESET, ("openai", "anthropic"), ("m", "n"))}

    assert files["list.json"]["providers"] == {
        "o": {"url": "http://127.0.0.1:11435/v1"},
        "a": {"url": "http://127.0.0.1:11435"},
        "named": {"models": [{"id": "m", "name": "m"}, {"id": "n", "name": "n"}]},
    }
    assert files["default.json"] == {"use": "openai/m"}
    only = dict(model_files(PRESET, ("openai",), ()))
    assert json.loads(only["list.json"]) == {"providers": {"o": {"url": "http://127.0.0.1:11435/v1"}}}


def test_what_needs_a_model_is_left_out_where_none_is_named() -> None:
    """A policy with patterns only leaves the product its default."""
    files = dict(model_files(PRESET, ("anthropic",), ()))

    assert list(files) == ["list.json"]
    assert "named" not in files["list.json"]


@pytest.mark.parametrize("name", ['a"b', "{model}", "{providers}", "a\\b", "ü\n"])
def test_a_name_stays_a_name(name: str) -> None:
    """Whatever a model is called, it is a string in the file, and fills nothing else."""
    files = {path: json.loads(text) for path, text in model_files(PRESET, ("anthropic",), (name,))}

    assert files["default.json"] == {"use": f"anthropic/{name}"}
    assert files["list.json"]["providers"]["named"]["models"][0]["id"] == name


@pytest.mark.parametrize("preset", ["pi", "openclaw"])
def test_presets_make_files_that_parse(preset: str) -> None:
    """For every set of protocols the files are JSON, name our endpoint only, and hold no key."""
    for protocols in (("anthropic",), ("openai",), ("openai-responses", "openai"), ("openai", "anthropic")):
        for path, text in model_files(builtin_presets()[preset], protocols, ("m",)):
            parsed = json.loads(text)
            for provider in parsed.get("providers", {}).values():
                assert provider["baseUrl"].startswith("http://127.0.0.1:11435"), path
                assert "CLOISTER_MODEL_KEY" in provider.get("apiKey", "CLOISTER_MODEL_KEY")
