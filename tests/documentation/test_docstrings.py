"""What users import says what it takes, what it gives and what it raises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import pytest

from ema_fused.engine import checks
from tests import ROOT

PACKAGE = ROOT / "ema_fused"

PUBLIC_MODULES = [
    "__init__",
    "adapters.__init__",
    *(
        f"adapters.{name}"
        for name in (
            "diffusers",
            "ema_pytorch",
            "swa_utils",
            "timm",
            "torch_ema",
            "torchtitan",
            "torchtitan_keys",
            "ultralytics",
        )
    ),
    *(f"callbacks.{name}" for name in ("accelerate", "huggingface", "lightning")),
    "saving.checkpoints",
    "saving.export",
    *(f"hooks.{name}" for name in ("mmcv", "mmdet", "mmengine", "mmpretrain", "mmselfsup")),
    "hooks.momentum_update",
    "modules.paired_module",
    "offloading.offloaded_plan",
    "posthoc.reconstruction",
    "averages.schedules",
    "averages.telemetry",
]

Function = ast.FunctionDef
Definition = ast.ClassDef | Function


class Found(NamedTuple):
    """A class or a function, and the module that defines it."""

    module: str
    node: Definition


@cache
def top_of(module: str) -> dict[str, ast.stmt]:
    """What a module binds at its top, by name."""
    path = PACKAGE.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(path.read_text())
    bound: dict[str, ast.stmt] = {}
    for statement in tree.body:
        if isinstance(statement, Definition):
            bound[statement.name] = statement
        elif isinstance(statement, ast.ImportFrom):
            bound |= {alias.asname or alias.name: statement for alias in statement.names}
        elif isinstance(statement, ast.Assign):
            bound |= {t.id: statement for t in statement.targets if isinstance(t, ast.Name)}
    return bound


def find(module: str, name: str) -> Found | None:
    """The definition that ``name`` means in a module; None where it is none of ours."""
    statement = top_of(module).get(name)
    if isinstance(statement, Definition):
        return Found(module, statement)
    if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Name):
        return find(module, statement.value.id)
    if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("ema_fused."):
        imported = next(a.name for a in statement.names if (a.asname or a.name) == name)
        return find((statement.module or "").removeprefix("ema_fused."), imported)
    return None


def names_in(module: str) -> list[str]:
    """``__all__``; else what the module defines without an underscore before it."""
    top = top_of(module)
    given = top.get("__all__")
    if isinstance(given, ast.Assign):
        return list(ast.literal_eval(given.value))
    return [n for n, s in top.items() if isinstance(s, Definition) and not n.startswith("_")]


def resolved(module: str, base: ast.expr) -> Found | None:
    """The class that a base is, as a module writes it; None where it is none of ours."""
    if isinstance(base, ast.Name):
        return find(module, base.id)
    if isinstance(base, ast.Attribute) and isinstance(base.value, ast.Name):
        imported = top_of(module).get(base.value.id)
        if isinstance(imported, ast.ImportFrom) and (imported.module or "").startswith("ema_fused"):
            path = f"{imported.module}.{base.value.id}"
            return find(path.removeprefix("ema_fused."), base.attr)
    return None


def bases_of(found: Found) -> list[Found]:
    """Those of a class that are ours, the nearest first."""
    assert isinstance(found.node, ast.ClassDef)
    direct = [base for b in found.node.bases if (base := resolved(found.module, b)) is not None]
    return [one for base in direct for one in (base, *bases_of(base))]


def methods_of(node: Definition) -> dict[str, Function]:
    return {part.name: part for part in node.body if isinstance(part, Function)}


def documentation(found: Found, node: Definition) -> str:
    """The docstring, with those of the classes and functions of ours that it refers to by ``as``.

    A constructor's is its class's; a method's that has none, that of the base it replaces.
    """
    texts = [ast.get_docstring(node) or ""]
    if isinstance(node, Function) and isinstance(found.node, ast.ClassDef):
        if node.name == "__init__":
            texts.append(ast.get_docstring(found.node) or "")
        elif not texts[0]:
            inherited = (methods_of(base.node).get(node.name) for base in bases_of(found))
            said = [ast.get_docstring(method) for method in inherited if method]
            texts += [text for text in said if text][:1]
    waiting = list(texts)
    while waiting:
        for path in re.findall(r"\b[aA]s\s+:(?:class|func|meth):`~?([\w.]+)`", waiting.pop()):
            text = _documentation_of(found, path)
            if text not in texts:
                texts.append(text)
                waiting.append(text)
    return "\n".join(texts)


def _documentation_of(found: Found, path: str) -> str:
    """The docstring of what a reference names: a class or function, or a method of this class."""
    methods = methods_of(found.node)
    if path in methods:
        return ast.get_docstring(methods[path]) or ""
    *where, name = path.split(".")
    if where and where[0] == "ema_fused":
        named = find(".".join(where[1:]) or "__init__", name)
    else:
        named = find(found.module, name) or _anywhere(name)
    assert named is not None, f"{found.node.name} refers to {path}, which is not there"
    return ast.get_docstring(named.node) or ""


def _anywhere(name: str) -> Found | None:
    """A class or method of any public class."""
    for found in PUBLIC:
        if found.node.name == name:
            return found
        if name in methods_of(found.node):
            return Found(found.module, methods_of(found.node)[name])
    return None


# Bases of nobody's that say what a class's own methods are given.
PLAIN_BASES = {"NamedTuple", "TypedDict", "UserWarning", "nn.Module"}


def is_called_by_a_framework(found: Found) -> bool:
    """Whether the class derives from one of a framework, which says what its methods are given."""
    if not isinstance(found.node, ast.ClassDef):
        return False
    if any(is_called_by_a_framework(base) for base in bases_of(found)):
        return True
    foreign = [base for base in found.node.bases if resolved(found.module, base) is None]
    return not {ast.unparse(base) for base in foreign} <= PLAIN_BASES


def parameters_of(function: Function) -> list[str]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [a.arg for a in named if a.arg not in ("self", "cls") and not a.arg.startswith("_")]


def is_named(parameter: str, text: str) -> bool:
    """As an entry under ``Args:``, or within double backquotes."""
    entry = rf"^ +(?:[\w*]+, )*\*{{0,2}}{parameter}(?:, [\w*]+)*:"
    quoted = any(
        re.search(rf"\b{parameter}\b", code) for code in re.findall(r"``(.+?)``", text, re.DOTALL)
    )
    return quoted or re.search(entry, text, re.MULTILINE) is not None


def raised_in(function: Function) -> set[str]:
    """The exceptions that stand in a function's own ``raise`` statements.

    Those of ``checks``, which are assertions too, by the error that a caller knows them as.
    """
    names = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(error, ast.Name) and error.id[0].isupper():
                ours = getattr(checks, error.id, None)
                names.add(error.id if ours is None else ours.__base__.__name__)
    return names


def is_said_to_raise(error: str, text: str) -> bool:
    sections = re.findall(r"^Raises[^\n]*:\n(.*?)(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    lines = re.findall(r"^Raises[^\n]*:[^\n]*", text, re.MULTILINE)
    return re.search(rf"\b{error}\b", "\n".join(sections + lines)) is not None


PUBLIC = sorted(
    {
        found
        for module in PUBLIC_MODULES
        for name in names_in(module)
        if (found := find(module, name)) is not None
    },
    key=lambda found: (found.module, found.node.name),
)


def functions() -> Iterator[tuple[str, Found, Function]]:
    """Public functions, methods and constructors, each with its name for messages."""
    for found in PUBLIC:
        if isinstance(found.node, Function):
            yield f"{found.module}.{found.node.name}", found, found.node
            continue
        for name, method in methods_of(found.node).items():
            if name == "__init__" or not name.startswith("_"):
                yield f"{found.module}.{found.node.name}.{name}", found, method


FUNCTIONS = list(functions())


def cases(items: list[tuple[str, Found, Function]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("found", "node"), [c[1:] for c in items], ids=[c[0] for c in items]
    )


def test_the_public_names_are_found() -> None:
    names = {f"{found.module}.{found.node.name}" for found in PUBLIC}
    assert {
        "engine.plan.Plan",
        "averages.schedules.cosine",
        "hooks.mmengine.EMAHook",
        "adapters.timm.ModelEmaV3",
    } < names
    assert len(FUNCTIONS) > 150
    for name in names_in("__init__"):
        assert find("__init__", name) is not None, name


@pytest.mark.parametrize("found", PUBLIC, ids=lambda found: f"{found.module}.{found.node.name}")
def test_every_public_name_has_a_docstring(found: Found) -> None:
    assert ast.get_docstring(found.node)


@cases(FUNCTIONS)
def test_every_public_method_has_a_docstring(found: Found, node: Function) -> None:
    assert documentation(found, node).strip()


@cases(
    [
        case
        for case in FUNCTIONS
        if case[2].name == "__init__" or not is_called_by_a_framework(case[1])
    ]
)
def test_every_parameter_is_named(found: Found, node: Function) -> None:
    text = documentation(found, node)
    assert [name for name in parameters_of(node) if not is_named(name, text)] == []


@cases(FUNCTIONS)
def test_every_exception_is_named(found: Found, node: Function) -> None:
    text = documentation(found, node)
    assert {error for error in raised_in(node) if not is_said_to_raise(error, text)} == set()
