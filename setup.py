"""Build `moe_ext._C`, the CPU library, and `moe_ext._C_cuda`, the CUDA kernels.

The CUDA kernels are built where torch has CUDA and a toolkit of its major version is found.
FORCE_CUDA=1 builds them for a torch without CUDA too, and fails without a toolkit. FORCE_CUDA=0
leaves them out. CUDA_HOME, TORCH_CUDA_ARCH_LIST and MAX_JOBS work as they do for torch.
REPOSITORY_URL gives the package its links. Everything else is in pyproject.toml.
"""

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent

# One library serves every Python; a free-threaded one has no limited API.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")


def load_toolkit():
    path = ROOT / "moe_ext" / "toolkit.py"
    spec = importlib.util.spec_from_file_location("toolkit", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def say(text: str) -> None:
    print(f"moe_ext: {text}", file=sys.stderr)


# Printed again at the end, below the output of the compilers.
last_words: list[str] = []

ISOLATION = "pip's --no-build-isolation builds for the torch that is installed"


def extensions() -> dict:
    build = load_toolkit()
    if build.find_compiler() is None:
        last_words.append(f"the package runs on its slower reference: {build.NO_COMPILER}")
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        sys.exit(
            f"moe_ext: torch is needed to build ({error}). Install torch >= 2.10 first and then "
            "run: pip install --no-build-isolation ."
        )

    def extension(name: str, sources: list[str], flags: list[str], link: list[str]) -> CppExtension:
        return CppExtension(
            name,
            sources,
            depends=build.headers(ROOT),
            extra_compile_args={"cxx": flags, "nvcc": build.cuda_flags()},
            extra_link_args=link,
            py_limited_api=LIMITED_API,
        )

    modules = [extension("moe_ext._C", build.sources(ROOT), build.compile_flags(), [])]
    choice = build.choose_toolkit()
    toolkit = choice.toolkit
    if toolkit:
        build.prepare_cuda(toolkit)
        link = build.cuda_link_flags(toolkit)
        flags = build.cuda_binding_flags(toolkit)
        modules.append(extension("moe_ext._C_cuda", build.cuda_sources(ROOT), flags, link))

    class Build(BuildExtension):
        def run(self):
            try:
                build.require_toolkit()
            except RuntimeError as error:
                sys.exit(f"moe_ext: {error}; {ISOLATION}")
            note = str(choice) if toolkit else f"{choice}; {ISOLATION}"
            say(note)
            if toolkit is None:
                last_words.append(note)
                # Else the package would hold the library of an earlier build.
                target = Path(self.get_ext_fullpath("moe_ext._C")).parent
                for folder in (target, Path(self.build_lib) / "moe_ext"):
                    for old in folder.glob("_C_cuda.*"):
                        old.unlink()
            elif torch.version.cuda is None:
                stub = Path(self.build_temp) / "stub"
                build.make_stub(stub)
                modules[-1].library_dirs.append(str(stub))
            super().run()

    return {"ext_modules": modules, "cmdclass": {"build_ext": Build}}


def urls() -> dict:
    """The links on PyPI. A release knows where its repository is; a fork's are not another's."""
    root = os.environ.get("REPOSITORY_URL", "").rstrip("/")
    pages = {"Documentation": "/tree/main/docs", "Changelog": "/blob/main/CHANGELOG.md"}
    pages |= {"Source": "", "Issues": "/issues"}
    return {name: root + page for name, page in pages.items()} if root else {}


options = {"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {}
setup(options=options, project_urls=urls(), **extensions())
for text in last_words:
    say(text)
