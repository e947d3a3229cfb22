"""Builds the compiled extension through CMakeLists.txt, or leaves it out.

Environment:
    EMA_FUSED_NATIVE      auto (default): build where there is a C++ compiler; 1: build or fail;
                          0: pure Python, everything runs on torch's foreach functions
    EMA_FUSED_CUDA        auto (default): with CUDA where nvcc is found; 1: with CUDA or fail;
                          0: without
    TORCH_CUDA_ARCH_LIST  architectures, as torch spells them: "8.0;9.0+PTX"
    CXX, CUDACXX          which compilers; CUDA_HOME or CUDA_PATH: the folder of the CUDA toolkit
    CMAKE_ARGS            more arguments for CMake: "-DEMA_FUSED_PTXAS_VERBOSE=ON"
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent

_SWITCH = {"0": "OFF", "off": "OFF", "1": "ON", "on": "ON", "auto": "AUTO", "": "AUTO"}
_NAMED_ARCHITECTURES = {
    "turing": "7.5",
    "ampere": "8.0;8.6",
    "ada": "8.9",
    "hopper": "9.0",
    "blackwell": "10.0;12.0",
}


def switch(name: str) -> str:
    """An environment variable that is 0, 1 or auto, as OFF, ON or AUTO."""
    value = os.environ.get(name, "").strip().lower()
    if value not in _SWITCH:
        raise SetupError(f"{name}={os.environ[name]!r}: 0, 1 or auto is expected")
    return _SWITCH[value]


def cuda_architectures(text: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST in CMake's spelling: "8.0;9.0+PTX" is 80-real, 90-real, 90-virtual."""
    words = [word for word in re.split(r"[;,\s]+", text.strip()) if word]
    found: list[str] = []
    for word in words:
        name, _, ptx = word.partition("+")
        spelled = _NAMED_ARCHITECTURES.get(name.lower(), name)
        if ptx.upper() not in ("", "PTX") or ("+" in word and not ptx):
            raise SetupError(_not_an_architecture(word))
        numbers = []
        for version in spelled.split(";"):
            match = re.fullmatch(r"(\d+)\.(\d)([af]?)", version)
            if match is None:
                raise SetupError(_not_an_architecture(word))
            numbers.append(match[1] + match[2] + match[3])
        found += [f"{number}-real" for number in numbers]
        if ptx:
            found.append(f"{numbers[-1]}-virtual")
    return list(dict.fromkeys(found))


def _not_an_architecture(word: str) -> str:
    return (
        f"TORCH_CUDA_ARCH_LIST: {word!r} is not an architecture; "
        f'versions like "8.0;9.0+PTX" or names like "Ampere" are expected'
    )


def cxx_compiler() -> str | None:
    """The C++ compiler's command, or None where there is none."""
    asked = os.environ.get("CXX", "").strip()
    if asked:
        return asked if shutil.which(shlex.split(asked)[0]) else None
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def why_no_extension() -> str | None:
    """What this machine lacks for building the extension; None where nothing is missing."""
    if sys.platform != "linux":
        return f"the native kernels are built on Linux, and this is {sys.platform}"
    if cxx_compiler() is None:
        return "no C++ compiler was found (c++, g++ or clang++ on PATH, or CXX)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        return f"Python's headers are missing: {header} (on Debian: apt-get install python3-dev)"
    return None


def builds_native() -> bool:
    """Whether to build the extension.

    Raises:
        SetupError: it, or CUDA in it, was asked for and no compiler is there.
    """
    native, cuda = switch("EMA_FUSED_NATIVE"), switch("EMA_FUSED_CUDA")
    if native == "OFF":
        if cuda == "ON":
            raise SetupError("EMA_FUSED_CUDA=1 needs what EMA_FUSED_NATIVE=0 leaves out")
        return False
    reason = why_no_extension()
    if reason is None:
        return True
    if native == "ON" or cuda == "ON":
        raise SetupError(
            f"{reason}. Install what is missing, or build pure Python with EMA_FUSED_NATIVE=0"
        )
    print(
        f"warning: {reason}: ema_fused is installed as pure Python and will run on torch's foreach "
        f"functions, which are slower",
        file=sys.stderr,
    )
    return False


def tool(name: str) -> str:
    """cmake or ninja: of the installed build requirement, else the one on PATH."""
    try:
        files = importlib.metadata.files(name) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    programs = [file.locate() for file in files if file.name == name and file.parent.name == "bin"]
    found = str(programs[0]) if programs else shutil.which(name)
    if found is None:
        raise SetupError(f"{name} was not found; it is a build requirement: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Runs CMake and Ninja where setuptools would call a compiler."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not build_temp: it is new at each editable install, and all would be compiled again. What
        # CMake has found out is forgotten all the same: compilers may have come, gone or changed.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for findings in (build / "CMakeFiles").glob("[0-9]*"):
            shutil.rmtree(findings)
        configure = [
            tool("cmake"),
            f"-S{ROOT}",
            f"-B{build}",
            "-GNinja",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DEMA_FUSED_VERSION={self.distribution.get_version()}",
            f"-DEMA_FUSED_CUDA={switch('EMA_FUSED_CUDA')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        if architectures.strip():
            joined = ";".join(cuda_architectures(architectures))
            configure.append(f"-DEMA_FUSED_CUDA_ARCHITECTURES={joined}")
        for command in (configure, [tool("cmake"), "--build", str(build), "--target", "_C"]):
            try:
                subprocess.run(command, check=True)
            except subprocess.CalledProcessError as error:
                raise SetupError(
                    f"building the extension failed (see above); EMA_FUSED_CUDA=0 builds it "
                    f"without CUDA, EMA_FUSED_NATIVE=0 leaves it out. "
                    f"Command: {shlex.join(command)}"
                ) from error
        if not target.exists():
            raise SetupError(f"the build left no {target.name}")


class PureBuild(build_py):
    """For an install without the extension."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            # The package is imported from this folder, where an earlier build's would be found.
            for stale in (ROOT / "ema_fused").glob("_C.*.so"):
                stale.unlink()


if __name__ == "__main__":
    try:
        native = builds_native()
    except SetupError as error:
        sys.exit(f"error: {error}")
    setup(
        ext_modules=[Extension("ema_fused._C", sources=[])] if native else [],
        cmdclass={"build_ext": CMakeBuild} if native else {"build_py": PureBuild},
    )
