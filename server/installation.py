"""What is installed: this project's version, and a neighbour that cannot live beside it."""

from __future__ import annotations

import importlib.metadata

DISTRIBUTION = "dovetail-server"
# Hugging Face's package of that name holds a folder of the same name as one of ours, and transformers imports it.
RIVAL = "kernels"


class InstallationError(ImportError):
    """Two installed packages cannot be used together."""


def installed_version(distribution: str) -> str | None:
    """The version that pip knows; None where the package is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def own_version() -> str:
    """This project's version; ``unknown`` where the code runs without being installed."""
    return installed_version(DISTRIBUTION) or "unknown"


def check_installation() -> None:
    """Errors: InstallationError where Hugging Face's package ``kernels`` is installed as well."""
    if (found := installed_version(RIVAL)) is not None:
        raise InstallationError(
            f"Hugging Face's package 'kernels' {found} is installed in this environment and has the name of one of "
            "Dovetail's folders, so transformers and Dovetail cannot both work: pip uninstall kernels, or give "
            "Dovetail an environment of its own"
        )
