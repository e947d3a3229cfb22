"""The documentation: the site builds, has every public name, and what its pages show runs."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from sybil import Document, Example, Region
from sybil.parsers.markdown import PythonCodeBlockParser
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import ema_fused
from tests import ROOT
from tests.documentation import doc_commands

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

# ---- The site ------------------------------------------------------------------------------------

BUILD = """
import socket, sys
def refuse(*_, **__): raise SystemExit("the build of the site asks the network for something")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli()
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as ``make docs`` builds it, without a network."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="the site is built by mkdocs-material, mkdocstrings")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", BUILD, "build", "--strict", "--site-dir", str(folder)]
    printed = doc_commands.output(command, NO_MKDOCS_2_WARNING="1")
    assert "WARNING" not in printed
    return folder


def test_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))  # and the page of a wrong address
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"([^\"]+)", text)
        assert loaded
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], page
    for sheet in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8"))


# Of the folders whose modules are public: what their public modules are made of.
INTERNAL = {
    "ema_fused.adapters.accelerating",
    "ema_fused.adapters.following",
    "ema_fused.adapters.optimizer_states",
    "ema_fused.callbacks.huggingface_files",
    "ema_fused.callbacks.huggingface_shards",
    "ema_fused.callbacks.lightning_arguments",
    "ema_fused.callbacks.lightning_checkpoints",
    "ema_fused.callbacks.lightning_originals",
    "ema_fused.callbacks.lightning_saving",
    "ema_fused.callbacks.lightning_sharding",
    "ema_fused.callbacks.lightning_shards",
    "ema_fused.callbacks.shards",
    "ema_fused.callbacks.skipped_steps",
    "ema_fused.callbacks.trl_bema",
    "ema_fused.callbacks.wrapped_methods",
    "ema_fused.hooks.mmengine_averages",
    "ema_fused.hooks.on_mmcv",
    "ema_fused.hooks.on_mmengine",
    "ema_fused.hooks.registered_averages",
    "ema_fused.hooks.registering",
    "ema_fused.hooks.run_log",
}


def public_modules() -> dict[str, Path]:
    folder = ROOT / "ema_fused"
    names = ("__init__", "averages/schedules", "merging/__init__")
    names += ("saving/checkpoints", "saving/export")
    files = [folder / f"{name}.py" for name in names]
    for part in ("adapters", "callbacks", "hooks"):
        files += sorted((folder / part).glob("*.py"))
    modules = {}
    for file in files:
        words = file.relative_to(ROOT).with_suffix("").parts
        modules[".".join(word for word in words if word != "__init__")] = file
    assert set(modules) > INTERNAL
    return {name: file for name, file in modules.items() if name not in INTERNAL}


def public_names(file: Path) -> list[str]:
    """``__all__``, else the functions and classes without an underscore; nothing is imported."""
    tree = ast.parse(file.read_text(encoding="utf-8")).body
    for node in tree:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    defined = [node.name for node in tree if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [name for name in defined if not name.startswith("_")]


def test_every_public_name_has_a_place_in_the_pages(site: Path) -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    places = set(re.findall(r'id="([\w.]+)"', pages))
    names = [f"{m}.{name}" for m, file in public_modules().items() for name in public_names(file)]
    assert {f"ema_fused.{name}" for name in ema_fused.__all__} < set(names)
    assert len(names) > 60
    assert not [name for name in names if name not in places]


def test_pages_show_no_markup_of_sphinx(site: Path) -> None:
    for page in (site / "api").glob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r":(?:attr|class|func|meth|mod):", text), page
        assert not re.findall(r"::</p>", text), page


@pytest.mark.parametrize("name", NAMES)
def test_links_to_files_lead_somewhere(name: str) -> None:
    """Of pages as they are read in the repository; mkdocs checks those of the site."""
    page = ROOT / name
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not re.match(r"https?:", link):
            assert (page.parent / link).exists(), f"{name} links to {link}"
            inside = (page.parent / link).resolve().is_relative_to(ROOT / "docs")
            assert inside or page.parent == ROOT, f"{link} is no page of the site"


def test_links_show_titles_and_not_the_names_of_files() -> None:
    pages = {*PAGES, *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")}
    links = [
        (page.name, text)
        for page in pages
        for text in re.findall(r"(?<!!)\[([^\]]+)\]\([^)\s]+\)", page.read_text(encoding="utf-8"))
    ]
    assert len(links) > 50
    assert not [
        link for link in links if re.fullmatch(r"`?[\w./-]+\.(?:md|html|json|py)`?", link[1])
    ]


def test_files_that_are_named_are_there() -> None:
    """Sources that the pages name in code font, which nothing else checks."""
    folders = "benchmarks|csrc|docs|ema_fused|examples|requirements|tests"
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(rf"`((?:{folders})/[\w/.*-]+\.\w+)`", text):
            assert list(ROOT.glob(name)), f"{page.name} names {name}"


def test_citation_is_of_this_version() -> None:
    yaml = pytest.importorskip("yaml", reason="CITATION.cff is YAML")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0"
    assert cited["version"] == ema_fused.__version__
    assert cited["authors"] == [{"name": "The ema_fused authors"}]
    assert {"title", "message", "type"} <= set(cited)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'license = "{cited["license"]}"' in project
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text(encoding="utf-8")


# ---- Code in the pages ---------------------------------------------------------------------------

# Blocks that are no code, by page and first line: prints and diagrams.
TEXTS = {
    ("docs/kernel.md", "| head | pack 0 | pack 1 | pack 2 | ...                        | tail |"),
}

# What a page may use that a training has anyway. A page that needs more has a block of its own,
# which its readers don't see: <!--- invisible-code-block: python.
FRAMEWORKS = {
    "accelerate", "datasets", "diffusers", "ema_pytorch", "lightning", "mmcv", "mmdet", "mmengine",
    "mmpretrain", "mmselfsup", "safetensors", "timm", "torch_ema", "torchtitan", "transformers",
    "ultralytics",
}  # fmt: skip


class Batch(NamedTuple):
    x: Tensor
    y: Tensor


def training() -> dict[str, Any]:
    """A model and what it is trained by."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    fast, slow, source = ([torch.randn(shape) for shape in ((3, 4), (5,))] for _ in range(3))
    batches = [Batch(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(4)]

    def evaluate(evaluated: nn.Module) -> float:
        was_training = evaluated.training
        evaluated.eval()
        with torch.no_grad():
            right = sum(int((evaluated(x).argmax(1) == y).sum()) for x, y in batches)
        evaluated.train(was_training)
        return right / 64

    return {
        "torch": torch,
        "nn": nn,
        "ema_fused": ema_fused,
        "fully_shard": fully_shard,
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "criterion": nn.functional.cross_entropy,
        "batches": batches,
        "evaluate": evaluate,
        "averaged": [tensor.clone() for tensor in source],
        "source": source,
        "fast": fast,
        "slow": slow,
        "scaler_flag": torch.zeros(()),
    }


def fenced(document: Document) -> Iterable[Region]:
    """All fenced blocks but those in Python, which Sybil's own parser finds."""
    lexer = RawFencedCodeBlockLexer(re.compile(r"[ \t]*(?P<language>[^\n]*?)[ \t]*$\n", re.M))
    for region in lexer(document):
        if region.lexemes["language"] != "python":
            yield Region(
                region.start,
                region.end,
                (region.lexemes["language"], region.lexemes["source"]),
                check_block,
            )


def check_block(example: Example) -> None:
    """A block in another language than Python: shell commands, or one that is listed as text."""
    language, source = example.parsed
    if language == "sh":
        for command in doc_commands.commands(source):
            doc_commands.check(command)
        return
    page = str(Path(example.path).relative_to(ROOT))
    assert language == "text", f"a block in {language!r}; python, sh or text is expected"
    first = source.splitlines()[0]
    assert (page, first) in TEXTS, f"text that is not listed in TEXTS: {first!r}"


def parsed(page: Path) -> Document:
    return Document.parse(str(page), PythonCodeBlockParser(), fenced)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of one, for what the pages show of sharded models."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", NAMES)
def test_every_block_of_a_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    document = parsed(ROOT / name)
    document.namespace.update(training())
    folder = tmp_path / "page"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for example in document.examples():
        with subtests.test(msg=f"{name}, line {example.line}"):
            try:
                example.evaluate()
            except ImportError as error:
                missing = error if error.name else error.__cause__
                package = str(getattr(missing, "name", "")).partition(".")[0]
                if package not in FRAMEWORKS or importlib.util.find_spec(package) is not None:
                    raise
                pytest.skip(f"{package} is not installed")


def test_no_block_is_left_out() -> None:
    """As many blocks as a search for fences finds that knows nothing of Sybil."""
    total = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        fences = re.findall(r"^[ \t]*(?:`{3,}|~{3,})", text, re.M)
        hidden = re.findall(r"^<!--- invisible-code-block: python$", text, re.M)
        assert len(fences) % 2 == 0
        assert len(list(parsed(page).examples())) == len(fences) // 2 + len(hidden)
        total += len(fences) // 2
    assert total > 20
