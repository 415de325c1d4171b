"""Builds the native kernels: one shared object with a C interface, every instruction set inside, chosen at run time.

Everything is installed into a folder of its own, `_dovetail`, that a .pth file puts on the path: Hugging Face's package
`kernels` has the name of one of ours, and pip would let the later of the two overwrite the other's files. With both in
one environment, transformers keeps its package and `dovetail` says in one sentence why it cannot start.

The extension is optional: where no compiler is found, or it fails, the install goes on without it and torch's own
products stand in (see kernels/native.py). Wheels that are built to be handed on must not lose it silently:
DOVETAIL_REQUIRE_NATIVE=1 makes a failed build an error. DOVETAIL_SANITIZE=1 builds what `make sanitize` tests.
"""

import os
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.install_lib import install_lib

HOME = "_dovetail"
SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-O1",
    "-g1",
]
CHECKS = SANITIZERS if os.environ.get("DOVETAIL_SANITIZE") == "1" else []

NATIVE = Extension(
    "kernels._native",
    sources=sorted(glob("kernels/*/csrc/*.cpp")),
    include_dirs=sorted(glob("kernels/*/csrc")),
    depends=sorted(glob("kernels/*/csrc/*.h")),
    # Contraction off: a product and a sum must not fuse in one number of rows and stay apart in another.
    extra_compile_args=[
        "-std=c++20",
        "-O3",
        "-ffp-contract=off",
        "-fno-trapping-math",
        "-fno-math-errno",
        "-fvisibility=hidden",
        "-pthread",
        "-Wall",
        "-Wno-maybe-uninitialized",  # both: GCC 12 warns inside its own AVX-512 headers
        "-Wno-uninitialized",
        *CHECKS,
    ],
    extra_link_args=["-pthread", *CHECKS],
    language="c++",
    optional=os.environ.get("DOVETAIL_REQUIRE_NATIVE") != "1",
)


class InstallApart(install_lib):
    """Installs below `_dovetail` and puts that folder on the path; editable installs do not come here."""

    def finalize_options(self):
        """Where the packages go, and the file that leads there."""
        super().finalize_options()
        self.path_file = Path(self.install_dir) / "dovetail_server.pth"
        self.install_dir = str(Path(self.install_dir) / HOME)

    def install(self):
        """Copy the packages, write the file."""
        installed = super().install()
        self.path_file.write_text(f"{HOME}\n")
        return installed

    def get_outputs(self):
        """What an uninstall has to remove."""
        return [*super().get_outputs(), str(self.path_file)]


setup(ext_modules=[NATIVE], cmdclass={"install_lib": InstallApart})
