"""Plant errors one at a time in a copy of the package, and see which test catches each (mutations.py has the list).

    python tools/mutate.py                    all of them: an hour on two cores
    python tools/mutate.py rtn-levels ...     these
    python tools/mutate.py --check            only whether each can still be planted
    python tools/mutate.py --write FILE       a table of what was planted and what caught it; without it, on stdout

Nothing in the repository is changed: the copy, and what is built of it, lies in build/mutants.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "mutants"
COPY = PLACE / "src" / "bitstrata"
NATIVE = "kernels/cpu/native/"
SLOW_TO_BUILD = ("avx512", "avxvnni")  # the C++ errors are planted in what all instruction sets share
PATIENCE = 1800  # seconds for the tests of one error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of the errors; all by default")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--write", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if not arguments.names or mutation.name in arguments.names]
    stale = [
        mutation.name
        for mutation in chosen
        if source(mutation).count(mutation.old) != 1 or not all((ROOT / path).exists() for path in mutation.tests)
    ]
    if stale or arguments.check:
        print(f"cannot be planted any more: {', '.join(stale) or 'none'}")
        return bool(stale)
    kept = PLACE / "results.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for native in (False, True):
        mutations = [mutation for mutation in chosen if mutation.file.startswith(NATIVE) == native]
        if not mutations:
            continue
        fresh_copy(native)
        for mutation in mutations:
            began = time.monotonic()
            results[mutation.name] = caught = plant(mutation, native)
            print(f"{mutation.name}: {caught or 'SURVIVED'} ({time.monotonic() - began:.0f} s)", flush=True)
            kept.write_text(json.dumps(results, indent=1))
    survived = [mutation.name for mutation in chosen if not results[mutation.name]]
    print(f"{len(chosen) - len(survived)} of {len(chosen)} caught; survived: {', '.join(survived) or 'none'}")
    text = table({mutation.name: mutation for mutation in MUTATIONS if mutation.name in results}, results)
    if arguments.write:
        arguments.write.write_text(text)
    else:
        print(text)
    return bool(survived)


def source(mutation: Mutation) -> str:
    return (ROOT / "src" / "bitstrata" / mutation.file).read_text()


def fresh_copy(native: bool) -> None:
    shutil.rmtree(COPY.parent, ignore_errors=True)
    PLACE.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "src" / "bitstrata", COPY, ignore=shutil.ignore_patterns("__pycache__"))
    if native:
        for name in SLOW_TO_BUILD:
            shutil.rmtree(COPY / NATIVE / name, ignore_errors=True)
        build()
        failed = test(("tests/kernels/test_instruction_sets.py", "tests/kernels/test_blocked.py"))
        if failed:
            raise SystemExit(f"the tests fail without any error: {failed}")


def plant(mutation: Mutation, native: bool) -> str:
    """The test that failed with the error in place, "" if none did."""
    path = COPY / mutation.file
    before = path.read_text()
    path.write_text(before.replace(mutation.old, mutation.new))
    try:
        if native:
            build()
        return test(mutation.tests[:1]) or test(mutation.tests[1:])
    finally:
        path.write_text(before)


def test(tests: tuple[str, ...]) -> str:
    """The first test that fails, "" if all pass."""
    if not tests:
        return ""
    environment = {**os.environ, "PYTHONPATH": str(COPY.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return f"no end within {PATIENCE} s"
    if done.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    if found is None:
        return f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-200:]!r}"
    return found[1]


def build() -> None:
    """The extension of the copy, optimised less than it will be: what it computes is the same."""
    tools, folder = PLACE / "tools", PLACE / "native"
    if not tools.exists():
        run("-m", "pip", "install", "--quiet", "--target", str(tools), "nanobind>=3,<4")
    if not (folder / "build.ninja").exists():
        shutil.rmtree(folder, ignore_errors=True)
        stand_in = PLACE / "CMakeLists.txt"  # finds the sources below src/
        shutil.copy(ROOT / "CMakeLists.txt", stand_in)
        command = ["cmake", "-G", "Ninja", "-S", str(PLACE), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
        command += [f"-Dnanobind_DIR={tools / 'nanobind' / 'cmake'}", "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]
        subprocess.run(command, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", str(folder)], check=True, capture_output=True)
    (built,) = folder.glob("_native*.so")
    for old in (COPY / "kernels" / "cpu").glob("_native*.so"):
        old.unlink()  # never written over while a process has it mapped
    shutil.copy(built, COPY / "kernels" / "cpu")


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True)


def table(mutations: dict[str, Mutation], results: dict[str, str]) -> str:
    lines = ["| planted | in | caught by |", "|---|---|---|"]
    for name, mutation in mutations.items():
        caught = results[name].removeprefix("tests/").partition("[")[0].replace("::", " ") or "nothing"
        lines.append(f"| {mutation.what} | `{mutation.file}` | {caught} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
