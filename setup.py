"""Compiles `csrc/` into the package against the torch of the environment; everything else is said in pyproject.toml.

torch is no build requirement: pip would put a second one, gigabytes of it, into the isolated build environment. The one that
the package will run with is found by its path instead; its headers and libtorch_cpu are all that is needed, and because only its
stable interface is used, the result loads in later versions too. Without torch or a compiler the package is installed without
the library, with the sources, and compiles them at first use (entropy_kernels/ops/cpu.py).
"""

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

SOURCES = Path(__file__).parent.resolve() / "csrc"
HEADERS = sorted(f"csrc/{path.name}" for path in SOURCES.glob("*.h"))
FLAGS = "-std=c++17 -O3 -fPIC -shared -Wno-psabi -DTORCH_TARGET_VERSION=0x020a000000000000".split()


def torch_directory() -> Path:
    """The torch that can be imported here, or the one of the environment that pip isolates this build from."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    for place in places:
        if (place / "include/torch/csrc/stable/library.h").exists():
            return place
    raise CompileError("there is no torch >= 2.10 in the environment yet")


class BuildRows(build_ext):
    """One shared library without Python symbols, for torch.ops.load_library; a failure is a warning (optional=True)."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library's name without the Python version that other extensions carry."""
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """One call of the compiler."""
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # never an older one
        torch = torch_directory()
        command = [os.environ.get("CXX", "c++"), *FLAGS, f"-I{torch / 'include'}", *ext.sources]
        try:
            subprocess.run(
                [*command, f"-L{torch / 'lib'}", "-ltorch_cpu", "-o", str(target)],
                cwd=SOURCES.parent,
                check=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(str(error)) from error


class BuildWithSources(build_py):
    """Ships csrc/ inside the package."""

    def run(self) -> None:
        """Copies the modules, then the sources; an editable install finds them where they are."""
        super().run()
        if not self.editable_mode:
            shutil.copytree(SOURCES, Path(self.build_lib) / "entropy_kernels" / "csrc", dirs_exist_ok=True)


setup(
    ext_modules=[Extension("entropy_kernels._rows", ["csrc/rows.cpp"], depends=HEADERS, optional=True)],
    cmdclass={"build_ext": BuildRows, "build_py": BuildWithSources},
)
