"""Digests of config.json, one for each of its fields.

Files of weights are compared byte by byte. config.json is not: tools write it anew, with other spaces,
another order, `10000` for `10000.0`; and people change it on purpose, as when a model card says how to
extend the context. So each top-level field has a digest of its value, which tells what was changed:

    sha256 of the value as JSON in ASCII: keys sorted, no spaces, everything outside ASCII escaped, numbers by
    value: one without a fraction, below 2^53, as an integer, any other in the fewest digits that give it back

The digests are in the index, under `metadata.config_sha256` (FORMAT.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def config_digests(config: Mapping[str, Any]) -> dict[str, str]:
    """Top-level field of config.json -> hex digest of its value, sorted by name."""
    plain = json.loads(json.dumps(config))  # what a reader will find: lists for tuples, strings for keys
    return {name: _digest(plain[name]) for name in sorted(plain)}


def changed_fields(config: Mapping[str, Any], digests: Mapping[str, str]) -> tuple[str, ...]:
    """The fields that are not those the digests were made of: changed, gone or new; sorted by name."""
    found = config_digests(config)
    return tuple(name for name in sorted(found.keys() | digests.keys()) if found.get(name) != digests.get(name))


def _digest(value: object) -> str:
    text = json.dumps(_by_value(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _by_value(value: object) -> object:
    """`value` with every number in the one form that stands for it."""
    if isinstance(value, dict):
        return {key: _by_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_by_value(item) for item in value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value
