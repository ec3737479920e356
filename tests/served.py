"""`bitstrata serve` as a process."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path


def serve(folder: Path, *arguments: str, wait: float, **environment: str) -> tuple[subprocess.Popen[str], list[str]]:
    """A server of `folder` at a free port, once it takes requests, and the lines that it says, also later."""
    command = [sys.executable, "-m", "bitstrata.cli.main", "serve", str(folder), "--port", "0", *arguments]
    child = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, **environment}
    )
    said: list[str] = []
    ready = threading.Event()

    def listen() -> None:
        assert child.stderr is not None
        for line in child.stderr:
            said.append(line)
            if "serving" in line:
                ready.set()
        ready.set()

    threading.Thread(target=listen, daemon=True).start()
    if not ready.wait(wait):
        child.kill()
        raise AssertionError(f"it never said that it serves: {said}")
    return child, said
