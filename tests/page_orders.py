"""Page orders for tests: any order is one, as long as it leads from the smallest plan to the largest."""

from __future__ import annotations

import random
from pathlib import Path

from bitstrata.checkpoint import CheckpointReader, Fingerprint
from bitstrata.plans import PAGES_FILE, ModelSizes, Page, PageOrder


def write_order(folder: Path, seed: int = 0) -> PageOrder:
    """Store a random order of single steps in `folder`, and return it."""
    reader = CheckpointReader(folder)
    sizes, draw = ModelSizes.of(reader), random.Random(seed)
    ladders = {name: sorted(held) for name, held in sizes.layers.items()}
    steps = [name for name, ladder in ladders.items() for _ in ladder[1:]]
    draw.shuffle(steps)
    at, pages = dict.fromkeys(ladders, 0), []
    for name in steps:
        low, high = ladders[name][at[name] : at[name] + 2]
        at[name] += 1
        grown = sizes.layers[name][high] - sizes.layers[name][low]
        pages.append(Page(layers=[name], from_bits=low, to_bits=high, bytes=grown, saving=1.0))
    order = PageOrder(pages, Fingerprint.of(reader))
    order.check(reader, sizes)
    order.save(folder / PAGES_FILE)
    return order
