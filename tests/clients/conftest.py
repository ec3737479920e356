"""`bitstrata serve` as a process, on the bundled trained model with a chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from client_helpers import NAME, WAIT, Running
from served import serve

TEMPLATE = (
    "{% for message in messages %}# {{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}# reply:{% endif %}"
)


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    """These files import clients that other environments do not have."""
    return None if config.getoption("markexpr") == "clients" else True


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    import bitstrata
    from bitstrata.demonstration.run import MODEL
    from bitstrata.models import load_tokenizer

    folder = tmp_path_factory.mktemp("served") / NAME
    bitstrata.quantize(MODEL, folder, bits="2-4", method="rtn")
    tokenizer = load_tokenizer(MODEL)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    child, said = serve(folder, wait=WAIT)
    try:
        found = re.search(r"at (http://127\.0\.0\.1:\d+)/v1", "".join(said))
        assert found is not None, said
        yield Running(found[1], folder)
    finally:
        child.terminate()
        assert child.wait(WAIT) == 0


@pytest.fixture(scope="session")
def said(server: Running) -> Callable[..., str]:
    """said(messages, ...) -> the greedy text of a chat by plain HTTP, at 3 bits."""

    def ask(messages: list[dict[str, Any]], **settings: Any) -> str:
        body = {"model": f"{NAME}:3", "messages": messages, "temperature": 0, "max_tokens": 12, **settings}
        text: str = server.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]
        return text

    return ask
