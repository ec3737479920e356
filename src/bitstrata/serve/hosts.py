"""The names that a server goes by.

A web page can give its own name this machine's address (DNS rebinding); to the browser our answers are then that
page's own, and no rule about origins holds. What gives it away is the Host that it must send: its name. An address is
no name, so nobody else can own it, and `localhost` is never looked up elsewhere.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Collection

ANY = "*"
_HOST = re.compile(r"(?P<name>\[[^]]*\]|[^:\[\]]*)(:\d*)?")
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?")


def is_served(host: str, names: Collection[str]) -> bool:
    """Whether a request for `host`, NAME or NAME:PORT, is meant for a server that goes by `names` as well."""
    if ANY in names:
        return True
    found = _HOST.fullmatch(host.strip().lower())
    if found is None:
        return False
    name = found["name"].removesuffix(".")
    if is_address(name.strip("[]")):
        return True
    return name == "localhost" or name.endswith(".localhost") or name in names


def is_name(text: str) -> bool:
    """Whether `text` can be one of a server's names: lower case, without a scheme, port or path."""
    return text == ANY or _NAME.fullmatch(text) is not None


def is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an IP address."""
    return ipaddress.ip_address(address).is_loopback
