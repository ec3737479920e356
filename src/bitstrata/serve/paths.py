"""The paths of the server: what they are called, also by clients that call them otherwise, and what each takes.

Clients differ in whether their base address ends in `/v1` or with a slash, and a proxy may serve all of it below a
prefix of its own, which it takes off or leaves there. So a path is put in order before anything looks at it.
"""

from __future__ import annotations

import difflib
import re

V1 = "/v1"
CHAT, COMPLETIONS = f"{V1}/chat/completions", f"{V1}/completions"
RESPONSES, MESSAGES, COUNT = f"{V1}/responses", f"{V1}/messages", f"{V1}/messages/count_tokens"
MODELS = f"{V1}/models"
METHODS = {  # what each path takes; GET is HEAD as well
    CHAT: "POST",
    COMPLETIONS: "POST",
    RESPONSES: "POST",
    MESSAGES: "POST",
    COUNT: "POST",
    "/tokenize": "POST",
    "/detokenize": "POST",
    MODELS: "GET",
    "/metrics": "GET",
    "/openapi.json": "GET",
    "/health": "GET",
    "/": "GET",
}
OPEN = {"/", "/health"}  # they need no key and are served however much there is to do
ANTHROPIC = {MESSAGES, COUNT}


def ordered(path: str, root: str) -> str:
    """`path` as it is called here: without the prefix `root`, doubled slashes and one at its end, with /v1."""
    if root and (path == root or path.startswith(f"{root}/")):
        path = path[len(root) :]
    path = re.sub("/{2,}", "/", path)
    path = path.rstrip("/") or "/"
    path = re.sub(f"^({V1})+(?=/)", V1, path)
    if route(V1 + path) != "other":
        return V1 + path
    plain = path.removeprefix(V1)
    return plain if plain in METHODS and plain != "/" else path


def route(path: str) -> str:
    """A label of which there are few, whatever clients ask for."""
    if path.startswith(f"{MODELS}/"):
        return f"{MODELS}/{{model}}"
    return path if path in METHODS else "other"


def method(path: str) -> str | None:
    """What a path takes; None where there is nothing."""
    return "GET" if path.startswith(f"{MODELS}/") else METHODS.get(path)


def nothing_at(path: str) -> str:
    """What is said of a path where there is nothing."""
    near = difflib.get_close_matches(path[:100], METHODS, 1, cutoff=0.5)
    return "there is nothing at this path; " + (
        f"did you mean {near[0]}?" if near else f"there are {', '.join(METHODS)}"
    )
