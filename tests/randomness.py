"""Where random cases come from: fixed ones in the ordinary run, as many others as one likes with TEST_SEED."""

from __future__ import annotations

import os

from hypothesis import settings

TEST_SEED = os.environ.get("TEST_SEED")
_MORE = 1 if TEST_SEED is None else 10

settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
settings.register_profile("fuzz", deadline=None, print_blob=True, max_examples=1000)
settings.load_profile("fixed" if TEST_SEED is None else "fuzz")


def examples(count: int) -> settings:
    """Settings of hypothesis for `count` examples; with TEST_SEED ten times as many."""
    return settings(max_examples=count * _MORE)
