"""What a server would run with, as a configuration file that says where each value comes from."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from server.settings import Settings, origin


def settings_text(settings: Settings, flags: Mapping[str, Any], config: Path | None) -> str:
    """TOML with a line for each setting; keys are not shown. ``flags``: what the command line gave, None where nothing.

    A setting without a value stands as a comment.
    """
    in_file = {} if config is None else tomllib.loads(config.read_text(encoding="utf-8"))
    return "\n".join(f"{line(name, value)}  # {origin(name, flags, in_file, config)}" for name, value in settings)


def line(name: str, value: Any) -> str:
    """One setting in TOML."""
    return f"# {name} is not set" if value is None else f"{name} = {toml_value(value)}"


def toml_value(value: Any) -> str:
    """A value in TOML; JSON writes texts, numbers, true and false alike."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    return json.dumps(str(value) if isinstance(value, Path | SecretStr) else value)
