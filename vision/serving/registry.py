"""All kinds of models: whatever file lies in ``vision.serving.kinds``."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from vision.serving import kinds
from vision.serving.folder import ModelError, format_of
from vision.serving.protocol import Kind


@functools.cache
def all_kinds() -> Mapping[str, Kind]:
    """Name to kind, by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(kinds.__path__))
    found: list[Kind] = [import_module(f"{kinds.__name__}.{name}").KIND for name in names]
    return {kind.name: kind for kind in found}


def kind_of(config: Mapping[str, Any], source: str) -> Kind:
    """Whose ``format`` a config.json has. Errors: ModelError naming those that are known."""
    wanted, known = format_of(config), {kind.format: kind for kind in all_kinds().values()}
    if wanted not in known:
        raise ModelError(
            f"{source} does not describe a model that is served: its format is {wanted!r}; known are {', '.join(known)}"
        )
    kind = known[wanted]
    if config.get("version", 1) != kind.version:
        raise ModelError(f"{source} has version {config['version']} of {wanted}; this release reads {kind.version}")
    return kind
