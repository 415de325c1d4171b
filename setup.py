"""Builds the native kernels: one shared object with a C interface, every instruction set inside, chosen at run time.

The extension is optional: where no compiler is found, or it fails, the install goes on without it and the reference
kernels stand in (see kernels/native.py).
"""

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
        "-Wno-maybe-uninitialized",
    ],
    extra_link_args=["-pthread"],
    language="c++",
    optional=True,
)

setup(ext_modules=[NATIVE])
