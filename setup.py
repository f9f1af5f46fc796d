"""Builds `moe_ext._C`, the CPU library. Everything else is in pyproject.toml."""

import importlib.util
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent

# One file for every Python; a free-threaded one has no limited API to promise.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")


def load_build():
    spec = importlib.util.spec_from_file_location("build", ROOT / "moe_ext" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extensions() -> dict:
    build = load_build()
    if build.find_compiler() is None:
        print(
            "moe_ext: no C++ compiler found (set CXX to name one); installing without compiled "
            "kernels, on the plain-PyTorch reference",
            file=sys.stderr,
        )
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        sys.exit(
            f"moe_ext: torch is needed to build ({error}). Install torch >= 2.10 first and then "
            "run: pip install --no-build-isolation ."
        )
    extension = CppExtension(
        "moe_ext._C",
        build.sources(ROOT),
        depends=build.headers(ROOT),
        extra_compile_args={"cxx": build.compile_flags()},
        py_limited_api=LIMITED_API,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


options = {"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {}
setup(options=options, **extensions())
