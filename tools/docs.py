"""What the site (mkdocs.yml) has besides docs/: pages made from what is written elsewhere already.

README, FORMAT, ... at the top of the repository become pages. The commands come from the program itself, the Python
API from the package's `__all__`. Links between Markdown files are those of the repository, so that they work there as
well; here they are pointed at the site's pages. A link to anything that is no page is an error, as a broken link is.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import posixpath
import re
from pathlib import Path
from types import ModuleType

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

import bitstrata
from bitstrata.cli.main import app

ROOT = Path(__file__).parent.parent
TOP = {  # a file at the top of the repository -> its page
    "README.md": "index.md",
    "FORMAT.md": "format.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
SOURCE = {page: file for file, page in TOP.items()}
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {page: (ROOT / file).read_text(encoding="utf-8") for file, page in TOP.items()}
    pages["reference/commands.md"] = commands()
    pages["reference/python.md"] = python_api()
    pages["reference/inside.md"] = rooms()
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links between files of the repository become links between pages of the site."""
    path = page.file.src_uri
    here = posixpath.dirname(SOURCE.get(path, f"docs/{path}"))  # where the text is in the repository

    def point(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(here, link[2]))
        target = TOP.get(target, target.removeprefix("docs/"))
        return link[1] + posixpath.relpath(target, posixpath.dirname(path) or ".") + link[3]

    return LINK.sub(point, markdown)


def commands() -> str:
    """Every command with its options, as the program itself describes them."""
    program = typer.main.get_command(app)
    return get_docs_for_click(obj=program, ctx=typer.Context(program), name="bitstrata", title="Commands")


def python_api() -> str:
    """Everything that `import bitstrata` offers; the text is the docstrings'."""
    return "\n".join(["# Python", "", inspect.getdoc(bitstrata) or "", "", *described(bitstrata, set())])


def rooms() -> str:
    """What each room of the package offers to the others."""
    lines = ["# Inside", "", "What a contributor calls. These names may change from one version to the next.", ""]
    seen = set(offered(bitstrata))
    for found in pkgutil.iter_modules(bitstrata.__path__):
        if found.ispkg and found.name != "cli":
            room = importlib.import_module(f"bitstrata.{found.name}")
            lines += [f"## {found.name}", "", inspect.getdoc(room) or "", "", *described(room, seen)]
            seen |= offered(room)
    return "\n".join(lines)


def offered(module: ModuleType) -> set[object]:
    """The functions and classes in `__all__`; exceptions have a page of their own."""
    values = {getattr(module, name) for name in getattr(module, "__all__", ()) if callable(getattr(module, name))}
    ours = {value for value in values if getattr(value, "__module__", "").startswith("bitstrata")}
    return {v for v in ours if not (inspect.isclass(v) and issubclass(v, Exception)) and hasattr(v, "__qualname__")}


def described(module: ModuleType, seen: set[object]) -> list[str]:
    """An entry for each thing offered and not seen before, functions first."""
    new = sorted(offered(module) - seen, key=lambda value: (inspect.isclass(value), value.__name__))
    return [f"::: {value.__module__}.{value.__qualname__}\n" for value in new]
