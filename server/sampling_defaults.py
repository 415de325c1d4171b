"""How a model wants to be sampled where a request does not say: its folder's ``generation_config.json``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.engine.request import SamplingParams
from server.own_models import is_default
from server.text import TextError, read_json

FILE = "generation_config.json"
OF_DEFAULT = SamplingParams(temperature=0.2, top_p=0.9)  # as its card samples; at temperature 1 it babbles
ALLOWED: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value >= 0, "0 or more"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "top_k": (lambda value: value >= 0 and value == int(value), "a whole number of 0 or more"),
    "min_p": (lambda value: 0 <= value <= 1, "0 to 1"),
    "repetition_penalty": (lambda value: value > 0, "above 0"),
}


def read_sampling_defaults(folder: Path) -> SamplingParams:
    """What the file says, and OpenAI's defaults for the rest; ``do_sample: false`` is temperature 0.

    A GGUF file has none; the default model is sampled as its card does it. Errors: TextError naming file and key.
    """
    if is_default(folder):
        return OF_DEFAULT
    file = folder / FILE
    config = read_json(file)
    found: dict[str, Any] = {}
    for name, (is_allowed, allowed) in ALLOWED.items():
        value = config.get(name)
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not is_allowed(value):
            raise TextError(
                f"{name} in {file} is {str(value)[:40]!r}; allowed is {allowed}; mend it, or start with "
                "--sampling-defaults openai"
            )
        found[name] = int(value) if name == "top_k" else float(value)
    if config.get("do_sample") is False:
        found["temperature"] = 0.0
    return SamplingParams(**found)
