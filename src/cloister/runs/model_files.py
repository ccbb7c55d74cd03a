"""Files that tell a product which providers and models a run has, made from a preset's texts. Pure.

For products that take neither a variable nor an argument for their endpoint, or need to be told of a model before
they ask for it. No key stands in them: the texts name the variable that holds the run's placeholder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from cloister.isolation.environment import MODELS, model_url
from cloister.policy.model import Preset

_WORDS = re.compile(r"\{(providers|protocol|base_url|model)\}")


def model_files(preset: Preset, protocols: Sequence[str], models: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield path below the home and content of each file; none for a run without models.

    Args:
        preset: has the texts, with `{providers}`, `{protocol}`, `{model}`, `{models}` and `{base_url}` in them.
        protocols: those served inside, the one of the first provider first.
        models: names that stand for one model each. Where there is none, what needs one is left out.
    """
    if not protocols:
        return
    listed = json.dumps([{"id": name, "name": name} for name in models])
    providers = [
        text.replace("{base_url}", model_url(protocol)).replace("{models}", listed)
        for protocol in protocols
        for text in preset.model_providers.get(protocol, ())
        if models or "{models}" not in text
    ]
    fill = {
        "providers": ", ".join(providers),
        "protocol": protocols[0],
        "base_url": MODELS,
        "model": json.dumps(models[0])[1:-1] if models else "",
    }
    for path, text in preset.model_files.items():
        if not models and "{model}" in text:
            continue
        yield path, _WORDS.sub(lambda found: fill[found[1]], text)
