"""Write docs/reference/models.md: what becomes of every architecture of the installed transformers.

python tools/models_page.py                  the page, in some minutes
python tools/models_page.py llama qwen3_5    these rows, to stdout
"""

from __future__ import annotations

import importlib
import logging
import sys
import tempfile
import traceback
from multiprocessing import Pool
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HEAD = """# Models

What becomes of every architecture of transformers {version} that writes text, tried with a tiny random model of it:
quantized at 2, 3, 4 and 8 bits, loaded by bitstrata and by transformers, compared with the original, and generated
with. A model that also sees or hears keeps those parts as they are. `python tools/models_page.py` writes this page, and
a test compares it with what it finds.

{works} of {tried} language models work{experts}.
Others are refused by name, before anything is written: `not yet` says why. `no` is none that text alone can be given
to. Layers are named without the blocks, `#` stands for a number. What stands outside of the blocks stays as it is too;
`--head-bits` quantizes the head and the embedding.

| architecture | class | works | quantized | stays as it is |
|---|---|---|---|---|
"""


def attempt(name: str) -> Any:
    """The outcome of one architecture; a failure is one that says so."""
    sweep, torch = importlib.import_module("sweep"), importlib.import_module("torch")
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return sweep.attempt(name, Path(folder))
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            said = " ".join([str(frame.line), *str(error).split()])[:300].replace("|", "/")
            return sweep.Outcome(name, "", f"FAILED {type(error).__name__}: {said}")


def main(chosen: list[str]) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    sweep = importlib.import_module("sweep")
    with Pool(2) as pool:
        outcomes = pool.map(attempt, chosen or sweep.names(), chunksize=1)
    if chosen:
        print(*outcomes, sep="\n")
        return
    counted = [outcome for outcome in outcomes if outcome.status in ("yes", "not yet")]
    works = sum(outcome.status == "yes" for outcome in counted)
    experts = sum("mixture of experts" in outcome.why for outcome in counted)
    page = HEAD.format(
        version=importlib.import_module("transformers").__version__,
        tried=len(counted),
        works=works,
        experts=f"; {experts} are mixtures of experts that do not yet" if experts else "",
    )
    sweep.PAGE.write_text(page + "\n".join(map(str, outcomes)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
