"""The layout of the code: imports go down the list of rooms only, and the public names are these."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import bitstrata
from bitstrata.cli.commands import VERBS

SOURCE = Path(bitstrata.__file__).parent
# imports go to rooms further up in this list only; those that are not there yet are left out
ROOMS = [
    "errors",
    "version",
    "memory",
    "scratch",
    "torch_state",
    "option_fields",
    "options",
    "verbs",
    "progress",
    "tables",
    "metrics",
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
    "exchange",
    "runtime",
    "serve",
    "benchmark",
    "demonstration",
    "cli",
    "integrations",
]
GROUND = tuple(ROOMS[: ROOMS.index("metrics") + 1])  # one floor
MOST_FLOORS = 8
LATE = "kernels.triton"  # one of its files imports triton, and is itself imported where a product is first asked for
MODULES = sorted(SOURCE.rglob("*.py"))
HEAVY = ("fastapi", "llguidance", "matplotlib", "rich", "scipy", "typer", "uvicorn")
PUBLIC = {
    "Bench",
    "BenchOptions",
    "BitstrataConfig",
    "BitstrataError",
    "Constraint",
    "Conversation",
    "Demo",
    "Engine",
    "Environment",
    "EvaluateOptions",
    "Evaluation",
    "Export",
    "ExportOptions",
    "Generation",
    "GenerationSettings",
    "Import",
    "ImportOptions",
    "Inspection",
    "Plan",
    "PlanOptions",
    "PlanReport",
    "PushOptions",
    "Pushed",
    "QuantizeOptions",
    "Report",
    "Request",
    "Resized",
    "__version__",
    "bench",
    "demo",
    "env",
    "eval",
    "evaluate",
    "export_model",
    "generate",
    "import_model",
    "inspect",
    "layers",
    "load",
    "lora_on_planes",
    "plan",
    "push",
    "quantize",
    "resize",
    "use_bits",
}


def imported_modules(source: str, package: list[str], *, run: bool = False):
    """(line, dotted module below bitstrata) for every import of the package in `source`, at any depth.

    `package` is the path of the package that holds the module, e.g. ["bitstrata", "nn"].
    run: without what only a type checker imports.
    """
    tree = ast.parse(source)
    unseen: set[ast.AST] = set()
    for node in ast.walk(tree):
        if run and isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            unseen.update(inner for statement in node.body for inner in ast.walk(statement))
    for node in ast.walk(tree):
        if node in unseen:
            continue
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


def longest_chain(graph: dict[str, set[str]], start: str, above: tuple[str, ...] = ()) -> list[str]:
    """The longest way down from `start`; one that comes to the same name twice ends there."""
    if start in above:
        return [start]
    chains = (longest_chain(graph, target, (*above, start)) for target in sorted(graph.get(start, ())))
    return [start, *max(chains, key=len, default=[])]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every group of names each of which can be reached from all the others."""
    reached: dict[str, set[str]] = {}
    for name in graph:
        found, ahead = set(), [name]
        while ahead:
            new = graph.get(ahead.pop(), set()) - found
            found |= new
            ahead += new
        reached[name] = found
    groups = {frozenset(other for other in reached[name] if name in reached.get(other, ())) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def test_every_room_has_its_place_in_the_list():
    found = {path.stem if path.is_file() else path.name for path in SOURCE.iterdir()} - {"__init__", "__pycache__"}
    assert {name for name in found if not name.startswith((".", "py"))} - set(ROOMS) == set()


def test_imports_go_down_only_on_few_floors_and_in_no_circle():
    problems: list[str] = []
    rooms: dict[str, set[str]] = {}
    files: dict[str, set[str]] = {}
    known = {".".join(names_of(path)[0][1:]) for path in MODULES}
    for path in MODULES:
        source = path.read_text(encoding="utf-8")
        module, package = names_of(path)
        problems += upward_imports(source, module, package)
        if len(module) == 1:
            continue
        own = ".".join(module[1:])
        for _, target in imported_modules(source, package):
            here, there = ("ground" if name in GROUND else name for name in (module[1], target[0] if target else ""))
            rooms.setdefault(here, set()).update({there} - {here, ""})
        for _, target in imported_modules(source, package, run=True):
            file = next(name for end in range(len(target), -1, -1) if (name := ".".join(target[:end])) in known)
            if target[-1:] != ["_native"]:  # the extension, in no source file
                files.setdefault(own, set()).update({file} - {own})
    found = [circle for circle in circles(files) if not circle[0].startswith(LATE)]
    problems += [f"files import each other: {', '.join(circle)}" for circle in found]
    chain = max((longest_chain(rooms, room) for room in rooms), key=len)
    if len(chain) > MOST_FLOORS:
        problems.append(f"{len(chain)} floors, {MOST_FLOORS} are allowed: {' -> '.join(chain)}")
    assert not problems, "\n".join(problems)


def test_planted_circles_and_chains_are_found():
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}}
    assert circles(graph) == [["a", "b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}}) == []
    assert longest_chain(graph, "b") == ["b", "c", "a", "b"]
    assert longest_chain({"a": {"b", "c"}, "b": {"c"}}, "a") == ["a", "b", "c"]


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


def test_type_checkers_see_the_names_where_they_come_from():
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    shown = {
        alias.asname: (node.module, alias.name)
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert shown == bitstrata._HOMES


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        bitstrata.quantise  # noqa: B018
    assert set(bitstrata.__all__) <= set(dir(bitstrata))


def test_importing_is_light_and_registers_with_transformers():
    script = (
        "import sys, torch, transformers.modeling_utils, transformers.quantizers.auto as auto, time\n"
        "assert 'bitstrata' not in auto.AUTO_QUANTIZER_MAPPING\n"
        "before, start = set(sys.modules), time.perf_counter()\n"
        "import bitstrata\n"
        "print(f'{time.perf_counter() - start:.3f} s')\n"
        f"print(sorted(set({HEAVY!r}) & (set(sys.modules) - before)))\n"
        "assert 'bitstrata' in auto.AUTO_QUANTIZER_MAPPING and 'bitstrata' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[1] == "[]", done.stdout


@pytest.mark.parametrize("verb", [None, *VERBS])
def test_help_imports_no_torch(verb):
    command = [sys.executable, "-X", "importtime", "-m", "bitstrata.cli.main", *([verb] if verb else []), "--help"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "Usage: bitstrata" in done.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "transformers", "scipy", "numpy"}


def test_no_public_name_is_left_out_of_all():
    names = {name for name, value in vars(bitstrata).items() if not isinstance(value, types.ModuleType)}
    assert {name for name in names if not name.startswith("_")} <= set(bitstrata.__all__)


def test_the_version_is_that_of_the_package():
    assert bitstrata.__version__.split(".")[0].isdigit()


def test_every_module_can_be_imported_and_hides_no_public_function():
    others = {  # what needs them
        "triton": "bitstrata.kernels.triton.",
        "vllm": "bitstrata.integrations.vllm.",
        "lm_eval": "bitstrata.integrations.lm_eval",
    }
    absent = tuple(room for package, room in others.items() if not importlib.util.find_spec(package))
    for module in pkgutil.walk_packages(bitstrata.__path__, "bitstrata."):
        if not module.name.startswith(absent):
            importlib.import_module(module.name)
    for name in set(bitstrata.__all__) - {"__version__"}:
        assert callable(getattr(bitstrata, name)), name
