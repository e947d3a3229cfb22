"""Every message that a user of this repository can see, read from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import NamedTuple

from tests import ROOT

WORDS = 3  # of fixed text: what has fewer is a part of a message at most

_RAISED = re.compile(r"(Error|Exception|Warning)$|^warn$")
_THROWN = re.compile(r"(throw [\w:]+|\bcheck)\([^;]*$")
_LITERALS = re.compile(r'"(?:[^"\\\n]|\\.)*"(?:\s*"(?:[^"\\\n]|\\.)*")*')
_IN_QUOTES = re.compile(r'"((?:[^"\\\n]|\\.)*)"')


class Message(NamedTuple):
    """Its text with ``...`` for what varies, and where it stands."""

    text: str
    where: str


def plain(text: str) -> str:
    """On one line, and one ``...`` where several things that vary follow each other."""
    return re.sub(r"\.\.\.(\.\.\.)+", "...", " ".join(text.split()))


def words(text: str) -> int:
    """How many words of a message are fixed; 0 of what is no text: a path, a name, a pattern."""
    if " " not in text.strip():
        return 0
    return len(re.findall(r"[A-Za-z][A-Za-z'_]*", text.replace("...", " ")))


def in_python(source: str) -> Iterator[tuple[str, int]]:
    """(text, line) of strings with enough words, but docstrings, and of what is raised or warned.

    The strings of f-strings are one text. A message need not stand where it is raised: it is found
    wherever it is written.
    """
    tree = ast.parse(source)
    parts: set[int] = set()
    raised: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts.update(id(part) for part in node.values)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            parts.add(id(node.value))
        elif isinstance(node, ast.Call) and node.args:
            name = ast.unparse(node.func).rpartition(".")[2]
            if _RAISED.search(name):
                raised.add(id(node.args[0]))
    for node in ast.walk(tree):
        text = _template(node)
        if text is None or id(node) in parts:
            continue
        if words(text) >= WORDS or (id(node) in raised and words(text)):
            yield plain(text), getattr(node, "lineno", 0)


def _template(node: ast.AST) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values
        )
    return None


def in_cpp(source: str) -> Iterator[tuple[str, int]]:
    """(text, line) of literals with enough words, and of whatever is thrown."""
    source = re.sub(r"(?m)^[ \t]*//[^\n]*", "", source)
    for found in _LITERALS.finditer(source):
        text = "".join(_IN_QUOTES.findall(found[0]))
        is_thrown = _THROWN.search(source[max(0, found.start() - 90) : found.start()]) is not None
        if words(text) >= WORDS or (is_thrown and words(text)):
            yield plain(text), source.count("\n", 0, found.start()) + 1


def in_cmake(source: str) -> Iterator[str]:
    """What CMake stops with."""
    for found in re.finditer(r'message\(FATAL_ERROR((?:\s*"[^"]*")+)', source):
        text = "".join(_IN_QUOTES.findall(found[1]))
        yield plain(re.sub(r"\$(ENV)?\{\w+\}", "...", text))


def in_make(source: str) -> Iterator[str]:
    """What make says before it stops."""
    for found in re.finditer(r'echo((?:\s*"[^"]*")+);\s*exit 1', source.replace("\\\n", " ")):
        yield plain(" ".join(_IN_QUOTES.findall(found[1])))


def everywhere() -> Iterator[Message]:
    """All messages of the package, of its extension and of its build."""
    for path in [*sorted((ROOT / "ema_fused").rglob("*.py")), ROOT / "setup.py"]:
        for text, line in in_python(path.read_text(encoding="utf-8")):
            yield Message(text, f"{path.relative_to(ROOT)}:{line}")
    for path in sorted((ROOT / "csrc").iterdir()):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            for text, line in in_cpp(path.read_text(encoding="utf-8")):
                yield Message(text, f"{path.relative_to(ROOT)}:{line}")
    for name, read in (("CMakeLists.txt", in_cmake), ("Makefile", in_make)):
        for text in read((ROOT / name).read_text(encoding="utf-8")):
            yield Message(text, name)
