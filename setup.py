"""Builds the native kernels: one shared object with a C interface, every instruction set inside, chosen at run time.

The extension is optional: where no compiler is found, or it fails, the install goes on without it and torch's own
products stand in (see kernels/native.py). Wheels that are built to be handed on must not lose it silently:
DOVETAIL_REQUIRE_NATIVE=1 makes a failed build an error.
"""

import os
from glob import glob

from setuptools import Extension, setup

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
    ],
    extra_link_args=["-pthread"],
    language="c++",
    optional=os.environ.get("DOVETAIL_REQUIRE_NATIVE") != "1",
)

setup(ext_modules=[NATIVE])
