"""The bundled trained model, quantized once and served."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from arithmetic import exact_arithmetic
from http_calls import Served, served

import bitstrata
from bitstrata.demonstration.run import MODEL
from bitstrata.models import load_tokenizer
from bitstrata.runtime import Engine
from bitstrata.serve.app import create_app
from bitstrata.serve.settings import Settings

NAME = "small"
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' and loop.index > 1 %}"
    "{{ raise_exception('the system speaks first') }}{% endif %}"
    "# {{ message.role }}: {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}# reply:{% endif %}"
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("served") / NAME
    bitstrata.quantize(MODEL, output, bits="2-4", method="rtn")
    return output


@pytest.fixture(scope="session")
def model(checkpoint):
    """Exact, so that its tokens in an engine are those of its own generate."""
    with exact_arithmetic():
        return bitstrata.load(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(MODEL)


@pytest.fixture(scope="session")
def templated(tokenizer):
    """The tokenizer with a chat template."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATE
    return other


@pytest.fixture(scope="session")
def engine(model, tokenizer) -> Iterator[Engine]:
    with Engine(model, tokenizer, max_requests=16) as running:
        yield running


@pytest.fixture(scope="session")
def server(engine, tokenizer) -> Iterator[Served]:
    """A server as it is by default; tests leave it idle."""
    with served(create_app(engine, tokenizer, Settings(NAME)), engine) as running:
        yield running


@pytest.fixture(scope="session")
def chat_server(engine, templated) -> Iterator[Served]:
    """The same engine with a chat template."""
    with served(create_app(engine, templated, Settings(NAME)), engine) as running:
        yield running


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Real text, in lines."""
    return [line for line in Path(random.__file__).read_text().splitlines() if line.strip()]


@pytest.fixture
def serving(engine, tokenizer) -> Callable[..., AbstractContextManager[Served]]:
    """serving(api_key=..., ...) -> another server of the same engine, with these settings."""

    def start(**settings: Any) -> AbstractContextManager[Served]:
        return served(create_app(engine, tokenizer, Settings(NAME, **settings)), engine)

    return start


@pytest.fixture
def with_engine(checkpoint, tokenizer) -> Callable[..., AbstractContextManager[Served]]:
    """with_engine(dtype, max_requests=..., ...) -> a server with a model and an engine of its own."""

    @contextmanager
    def start(dtype: torch.dtype = torch.float32, **limits: Any) -> Iterator[Served]:
        own = bitstrata.load(checkpoint, dtype=dtype)
        with Engine(own, tokenizer, **limits) as running:
            with served(create_app(running, tokenizer, Settings(NAME)), running) as server:
                yield server
            running.close(drain=False)

    return start


@pytest.fixture(scope="session")
def alone(tokenizer, checkpoint):
    """alone(prompt, bits, new) -> the tokens of the model's own greedy generate for a text, one request at a time."""
    with exact_arithmetic():
        own = bitstrata.load(checkpoint, dtype=torch.float32)

    def generate(prompt: str, bits: int, new: int) -> list[int]:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        with torch.no_grad():
            output = own.generate(
                ids, attention_mask=torch.ones_like(ids), bits=bits, max_new_tokens=new, do_sample=False, pad_token_id=0
            )
        return output[0, ids.shape[1] :].tolist()

    return generate
