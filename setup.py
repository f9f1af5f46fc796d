"""Builds `moe_ext._C`, the CPU library, and `moe_ext._C_cuda`, the CUDA kernels.

The second where a CUDA toolkit is found and torch has CUDA, or with FORCE_CUDA=1. CUDA_HOME,
TORCH_CUDA_ARCH_LIST and MAX_JOBS mean what they do to torch. Everything else is in pyproject.toml.
"""

import importlib.util
import os
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


def say(text: str) -> None:
    print(f"moe_ext: {text}", file=sys.stderr)


def cuda_toolkit(build):
    """The toolkit to build the CUDA kernels with, or None."""
    import torch

    forced = os.environ.get("FORCE_CUDA") == "1"
    if torch.version.cuda is None and not forced:
        say(f"torch {torch.__version__} has no CUDA: CPU kernels only (FORCE_CUDA=1 builds both)")
        return None
    toolkit = build.find_toolkit()
    if toolkit is None:
        cure = "set CUDA_HOME, or pip install 'cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]'"
        if forced:
            sys.exit(f"moe_ext: FORCE_CUDA=1, but no CUDA toolkit found; {cure}")
        say(f"no CUDA toolkit found: CPU kernels only; {cure} and use --no-build-isolation")
        return None
    version = ".".join(map(str, toolkit.version))
    if torch.version.cuda and int(torch.version.cuda.split(".")[0]) != toolkit.version[0]:
        sys.exit(
            f"moe_ext: torch {torch.__version__} is for CUDA {torch.version.cuda}, the toolkit at "
            f"{toolkit.root} is CUDA {version}; set CUDA_HOME to one of torch's major version"
        )
    say(f"CUDA kernels with the toolkit at {toolkit.root}, CUDA {version}")
    return toolkit


def extensions() -> dict:
    build = load_build()
    if build.find_compiler() is None:
        say(
            "no C++ compiler found (set CXX to name one); installing without compiled kernels, on "
            "the plain-PyTorch reference"
        )
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        sys.exit(
            f"moe_ext: torch is needed to build ({error}). Install torch >= 2.10 first and then "
            "run: pip install --no-build-isolation ."
        )
    common = {"depends": build.headers(ROOT), "py_limited_api": LIMITED_API}
    flags = {"cxx": build.compile_flags(), "nvcc": ["-O3"]}
    modules = [CppExtension("moe_ext._C", build.sources(ROOT), extra_compile_args=flags, **common)]
    toolkit = cuda_toolkit(build)
    if toolkit:
        build.prepare_cuda(toolkit)
        modules.append(
            CppExtension(
                "moe_ext._C_cuda",
                build.cuda_sources(ROOT),
                extra_compile_args=flags,
                extra_link_args=build.cuda_link_flags(toolkit),
                **common,
            )
        )

    class Build(BuildExtension):
        def build_extensions(self):
            if toolkit and torch.version.cuda is None:
                stub = Path(self.build_temp) / "stub"
                build.make_stub(stub)
                modules[-1].library_dirs.append(str(stub))
            super().build_extensions()

    return {"ext_modules": modules, "cmdclass": {"build_ext": Build}}


options = {"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {}
setup(options=options, **extensions())
