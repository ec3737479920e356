"""What the site (mkdocs.yml) has besides docs/: pages made from what is written elsewhere already.

README, FORMAT, ... at the top of the repository become pages. The commands come from the program itself, the Python
API from the package's `__all__`. Links between Markdown files are those of the repository, so that they work there as
well; here they are pointed at the site's pages. A link to anything that is no page is an error, as a broken link is.
"""

from __future__ import annotations

import inspect
import posixpath
import re
from pathlib import Path

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
    """Everything that `import bitstrata` offers, functions before classes; the text is the docstrings'."""
    offered = {name: getattr(bitstrata, name) for name in bitstrata.__all__}
    functions = {value: name for name, value in sorted(offered.items()) if inspect.isfunction(value)}
    classes = {
        value: name
        for name, value in sorted(offered.items())
        if inspect.isclass(value) and not issubclass(value, Exception)  # they have a page of their own
    }
    lines = ["# Python", "", inspect.getdoc(bitstrata) or "", ""]
    for title, members in (("Functions", functions), ("Classes", classes)):
        lines += [f"## {title}", ""]
        lines += [f"::: {value.__module__}.{value.__qualname__}\n" for value in members]
    return "\n".join(lines)
