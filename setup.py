"""Builds the C++ backend, ``rnnkern._cpu``. Everything else about the package is in pyproject.toml.

The extension is optional: where it cannot be compiled the package installs without it, Numba does its work, and
``python -m rnnkern info`` says so. It includes neither torch nor any header of it, so that it builds in pip's isolated
environment and one build serves every torch version. No flag names an instruction set: each file under csrc/isa
states its own, and the choice is made at run time.
"""

import sys
from glob import glob

from setuptools import Extension, setup

COMPILE_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fopenmp",  # torch's own runtime, because both ask the loader for the same library name
    "-fvisibility=hidden",
    "-fno-math-errno",  # neither this nor the next changes a value: NaN and Inf stay as they are
    "-fno-trapping-math",
    "-g0",
]


def extensions() -> list[Extension]:
    sources = sorted(glob("csrc/*.cpp") + glob("csrc/isa/*.cpp"))
    if not sources:
        print("rnnkern: no sources in csrc/: installing without the C++ backend", file=sys.stderr)
        return []
    if sys.platform != "linux":
        print(f"rnnkern: the C++ backend is not built on {sys.platform}: installing without it", file=sys.stderr)
        return []
    import pybind11
    from pybind11.setup_helpers import ParallelCompile

    ParallelCompile("RNNKERN_BUILD_JOBS", default=0).install()  # 0: as many compilers at once as there are processors
    extension = Extension(
        "rnnkern._cpu",
        sources=sources,
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        include_dirs=["csrc", pybind11.get_include()],
        language="c++",
        extra_compile_args=COMPILE_FLAGS,
        extra_link_args=["-fopenmp"],
        optional=True,
    )
    return [extension]


setup(ext_modules=extensions())
