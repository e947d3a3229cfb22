"""The shell commands that README.md and docs/ show: which are run here, and what covers the rest.

A command that is neither run nor covered raises, and so does one that names an option, a target, a
script or a test that isn't there.
"""

from __future__ import annotations

import functools
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests import ROOT, processes

# Run as they stand, in the folder of the page's other blocks.
_RUN = re.compile(r"python -m ema_fused (info|reconstruct|(convert|inspect) run\.pt)\b")

_SETTING = re.compile(r"([A-Z_]+)=(.*)")


def output(command: Sequence[str], **environment: str) -> str:
    """What a command prints; it has to end well."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}"
    return done.stdout


def commands(block: str) -> list[list[str]]:
    """The commands of a block, as words; a backslash continues a line, ``#`` begins a comment."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def check(command: list[str]) -> None:
    """Runs a command, or sees that something covers it.

    Raises:
        AssertionError: it fails, is not covered, or names what isn't there.
    """
    words = list(command)
    settings = {}
    while words and (found := _SETTING.fullmatch(words[0])):
        settings[found[1]] = found[2]
        del words[0]
    if _RUN.match(shlex.join(words)):
        _python(*words[1:], **settings)
        return
    covered = [row for row in _COVERED if re.match(row.pattern, shlex.join(words))]
    assert covered, (
        f"{shlex.join(command)!r} is shown and nothing says what covers it; add it to "
        f"{Path(__file__).name}"
    )
    _is_there(covered[0].by)
    _known_settings(settings)
    covered[0].check(words)


def _is_there(by: str) -> None:
    """A test file, a test in one, or a target of the Makefile."""
    if by.startswith("make "):
        _makes(shlex.split(by))
        return
    file, _, test = by.partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not test or f"def {test}(" in text, f"{by} isn't there"


def _known_settings(settings: dict[str, str]) -> None:
    known = (ROOT / "setup.py").read_text(encoding="utf-8")
    for name in settings:
        assert re.search(rf"\b{name}\b", known), f"setup.py doesn't know {name}"


def _makes(words: list[str]) -> None:
    # Not by a dry run: make is content with a folder of that name.
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)
    assert phony is not None
    for target in words[1:]:
        assert "=" in target or target in phony[1].split(), f"the Makefile has no {target}"


def _runs_script(words: list[str]) -> None:
    """A script of ours, by python, torchrun or a shell: it is there, and knows its options."""
    place = next(i for i, word in enumerate(words) if word.endswith((".py", ".sh")))
    script = ROOT / words[place]
    assert script.is_file(), f"{words[place]} isn't there"
    if script.suffix == ".sh":
        output(["bash", "-n", str(script)])
        assert os.access(script, os.X_OK), f"{words[place]} can't be executed"
        return
    _knows([str(script)], words[place + 1 :])
    if words[0] == "torchrun":
        _knows(["-m", "torch.distributed.run"], words[1:place])


def _runs_module(words: list[str]) -> None:
    """A module of ours, perhaps with a command of it: it knows its options."""
    options = 4 if len(words) > 3 and not words[3].startswith("-") else 3
    _knows(words[1:options], words[options:])


def _knows(program: list[str], options: list[str]) -> None:
    told = _help(tuple(program))
    for option in options:
        if option.startswith("-"):
            name = option.partition("=")[0]
            assert re.search(rf"(?<![\w-]){name}(?![\w-])", told), f"{program[-1]} has no {name}"


@functools.cache
def _help(program: tuple[str, ...]) -> str:
    return _python(*program, "--help")


def _python(*arguments: str, **environment: str) -> str:
    """What ``python ARGUMENTS`` prints; it has to end well."""
    done = processes.run_fork("torch", *arguments, **environment)
    return done.stdout + done.stderr


def _installs(words: list[str]) -> None:
    """What pip gets is this folder, one of its extras, or a package that requirements/ pins."""
    pins = (ROOT / "requirements" / "constraints.txt").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    value_of = ""
    for word in words[2:] if words[0] == "pip" else words[4:]:
        if value_of or word.startswith("-"):
            is_file = value_of in ("-r", "--requirement", "-c", "--constraint")
            assert not is_file or (ROOT / word).is_file(), f"{word} isn't there"
            takes_value = (*_WITH_VALUE, "-r", "--requirement", "-c", "--constraint")
            value_of = word if word in takes_value else ""
            continue
        extras = re.fullmatch(r"(?:\.|ema_fused)\[([\w,]+)\]", word)
        if extras is not None:
            for extra in extras[1].split(","):
                assert extra in project["optional-dependencies"], f"there is no extra {extra}"
        elif word != "." and not word.endswith(".whl"):
            assert re.search(rf"^{re.escape(word)}==", pins, re.MULTILINE), f"{word} isn't pinned"


_WITH_VALUE = ("-w", "--wheel-dir", "--find-links")


def _tests(words: list[str]) -> None:
    for word in words[3:]:
        if not word.startswith("-") and ".py" in word:
            _is_there(word)


def _configures(words: list[str]) -> None:
    known = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    for word in words:
        name = re.match(r"-D(EMA_FUSED_\w+)=", word)
        assert name is None or name[1] in known, f"CMakeLists.txt doesn't know {word}"


def _compiles(words: list[str]) -> None:
    for word in words:
        assert not word.startswith("csrc") or (ROOT / word).exists(), f"{word} isn't there"


def _anything(_: list[str]) -> None:
    """Nothing of ours is named."""


class Covered(NamedTuple):
    """Commands that are too dear to run here: what runs the like, and what can still be seen."""

    pattern: str
    by: str
    check: Callable[[list[str]], None]


_COVERED = (
    Covered(r"make\b", "tests/documentation/doc_commands.py", _makes),
    Covered(r"pip (install|wheel)\b", "tests/project/test_build.py", _installs),
    Covered(r"\S*python -m pip (install|wheel)\b", "tests/project/test_build.py", _installs),
    Covered(r"python3? -m venv\b", "make test", _anything),
    Covered(r"\S*python -m pytest\b", "make test", _tests),
    Covered(r"torchrun\b.* examples/fsdp2", "tests/examples/test_example_fsdp2.py", _runs_script),
    Covered(r"python examples/fsdp2", "tests/examples/test_example_fsdp2.py", _runs_script),
    Covered(r"python examples/mmengine", "tests/examples/test_example_mmengine.py", _runs_script),
    Covered(r"python examples/merging", "tests/examples/test_example_merging.py", _runs_script),
    Covered(r"python examples/digits", "tests/examples/test_examples.py", _runs_script),
    Covered(
        r"python -m benchmarks\.large_models",
        "tests/documentation/test_large_models.py",
        _runs_module,
    ),
    Covered(
        r"python -m benchmarks\.sharded_step",
        "tests/bench/test_sharded_step.py",
        _runs_module,
    ),
    Covered(
        r"python -m benchmarks\.(numerics|past)",
        "tests/documentation/test_docs_pictures.py",
        _runs_module,
    ),
    Covered(
        r"python -m (ema_fused merge|benchmarks\.merging)\b",
        "tests/merging/test_command.py",
        _runs_module,
    ),
    Covered(r"\S*python -m (benchmarks|ema_fused bench)\b", "make bench", _runs_module),
    Covered(
        r"python -m ema_fused (convert|inspect)\b",
        "tests/converting/test_files.py::test_the_commands_print_what_they_did",
        _runs_module,
    ),
    Covered(r"benchmarks/gpu_check\.sh", "tests/bench/test_gpu_check.py", _runs_script),
    Covered(r"cmake\b", "make host-test", _configures),
    Covered(r"ctest\b", "make host-test", _anything),
    Covered(r"build/ptx_tests/\S+/ptx_kernels\b", "make ptx-test", _anything),
    Covered(
        r"nvcc\b",
        "tests/project/test_build.py::test_kernels_move_vectors_and_use_no_local_memory",
        _compiles,
    ),
    Covered(
        r"cuobjdump\b",
        "tests/project/test_build.py::test_every_default_architecture_compiles_without_spills",
        _anything,
    ),
)
