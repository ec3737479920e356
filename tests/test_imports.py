"""The layout of the code: imports go down the list of rooms only, and the public names are these."""

from __future__ import annotations

import ast
import subprocess
import sys
import types
from pathlib import Path

import pytest

import bitstrata

SOURCE = Path(bitstrata.__file__).parent
ROOMS = [
    "errors",
    "version",
    "progress",
    "memory",
    "torch_state",
    "planes",
    "arguments",
    "checkpoint",
    "kernels",
    "solvers",
    "nn",
    "models",
    "plans",
    "calibration",
    "evaluation",
    "quantization",
    "allocation",
    "runtime",
    "serve",
    "benchmark",
    "demonstration",
    "cli",
]
MODULES = sorted(SOURCE.rglob("*.py"))
PUBLIC = {
    "BitstrataError",
    "__version__",
    "bench",
    "demo",
    "env",
    "eval",
    "evaluate",
    "generate",
    "inspect",
    "layers",
    "load",
    "plan",
    "quantize",
    "resize",
    "use_bits",
}


def imported_modules(source: str, package: list[str]):
    """(line, dotted module below bitstrata) for every import of the package in `source`, at any depth.

    `package` is the path of the package that holds the module, e.g. ["bitstrata", "nn"].
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            names = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for name in names:
            if name[0] == "bitstrata":
                yield node.lineno, name[1:]


def upward_imports(source: str, module: list[str], package: list[str]) -> list[str]:
    """What is wrong with the imports of `source`, one sentence each."""
    if len(module) == 1:  # bitstrata/__init__.py is the roof
        return []
    own, problems = module[1], []
    for line, target in imported_modules(source, package):
        name = f"{'.'.join(module)}:{line}"
        if not target or target[0] not in ROOMS:
            problems.append(f"{name} imports from the package itself: {'.'.join(target)}")
        elif ROOMS.index(target[0]) > ROOMS.index(own):
            problems.append(f"{name} imports upward: {own} -> {target[0]}")
    return problems


def names_of(path: Path) -> tuple[list[str], list[str]]:
    """The dotted path of a module, and that of the package that resolves its relative imports."""
    parts = ["bitstrata", *path.relative_to(SOURCE).with_suffix("").parts]
    if parts[-1] == "__init__":
        return parts[:-1], parts[:-1]
    return parts, parts[:-1]


def test_every_room_has_its_place_in_the_list():
    found = {path.stem if path.is_file() else path.name for path in SOURCE.iterdir()} - {"__init__", "__pycache__"}
    assert {name for name in found if not name.startswith((".", "py"))} == set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down_only(path):
    assert upward_imports(path.read_text(encoding="utf-8"), *names_of(path)) == []


def test_the_walk_sees_imports_at_all():
    """Were the resolution of relative imports wrong, nothing would ever be upward."""
    path = SOURCE / "nn" / "embedding.py"
    seen = {target[0] for _, target in imported_modules(path.read_text(encoding="utf-8"), names_of(path)[1])}
    assert {"kernels", "planes", "nn"} <= seen


@pytest.mark.parametrize(
    "planted",
    [
        "from ..nn import use_bits",
        "from ..nn.bits import use_bits",
        "from .. import nn",
        "import bitstrata.nn",
        "import os, bitstrata.nn.bits as b",
        "from bitstrata import nn",
        "from bitstrata.nn import bits",
        "def late():\n    from ..nn import use_bits",
        "try:\n    from ..nn import use_bits\nexcept ImportError:\n    pass",
        "from .. import use_bits",
        "from bitstrata import use_bits",
        "import bitstrata",
    ],
)
def test_a_planted_upward_import_is_caught(planted):
    good = "import json\nfrom ..errors import BitstrataError\nfrom .pack import pack_bits\nfrom . import weights\n"
    where = (["bitstrata", "planes", "decode"], ["bitstrata", "planes"])
    assert upward_imports(good, *where) == []
    assert len(upward_imports(good + planted, *where)) == 1


def test_a_planted_upward_import_is_caught_in_a_package_and_in_a_single_file():
    assert upward_imports("from ..cli import main", ["bitstrata", "nn"], ["bitstrata", "nn"])
    assert not upward_imports("from .bits import use_bits", ["bitstrata", "nn"], ["bitstrata", "nn"])
    assert upward_imports("from .planes import decode", ["bitstrata", "errors"], ["bitstrata"])


def test_the_public_names_are_listed_here():
    assert set(bitstrata.__all__) == PUBLIC
    assert bitstrata.__all__ == sorted(bitstrata.__all__)
    assert all(getattr(bitstrata, name) is not None for name in PUBLIC)


def test_no_public_name_is_left_out_of_all():
    names = {name for name, value in vars(bitstrata).items() if not isinstance(value, types.ModuleType)}
    assert {name for name in names if not name.startswith("_")} <= set(bitstrata.__all__)


def test_the_version_is_that_of_the_package():
    assert bitstrata.__version__.split(".")[0].isdigit()


def test_functions_stay_functions_after_every_submodule_is_imported():
    """`bitstrata.quantize` is a function and a package; importing the package must not hide the function."""
    script = (
        "import importlib, importlib.util, pkgutil, bitstrata\n"
        "triton = importlib.util.find_spec('triton')\n"
        "for module in pkgutil.walk_packages(bitstrata.__path__, 'bitstrata.'):\n"
        "    if triton or not module.name.startswith('bitstrata.kernels.triton.'):\n"
        "        importlib.import_module(module.name)\n"
        "for name in set(bitstrata.__all__) - {'__version__'}:\n"
        "    assert callable(getattr(bitstrata, name)), name\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
