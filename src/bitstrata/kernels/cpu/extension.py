"""The native extension, if it is there.

It is built when the package is installed. Without a compiler the package installs all the same; the
reference kernel then runs, and says so once.
"""

from __future__ import annotations

from types import ModuleType

native: ModuleType | None
try:
    from . import _native as _extension
except ImportError as error:
    native, missing = None, f"the native extension is not there ({error})"
else:
    native, missing = _extension, ""
