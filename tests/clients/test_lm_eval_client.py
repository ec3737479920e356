"""lm-evaluation-harness through its clients of OpenAI's API, with tasks of our own: nothing is downloaded."""

from __future__ import annotations

import lm_eval
import pytest
from client_helpers import NAME
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from local_tasks import write_tasks

import bitstrata
from bitstrata.models import load_tokenizer

pytestmark = pytest.mark.clients
LIKELIHOODS = {
    "made_capitals": ("acc,none", {"abs": 0.17}),  # one question of six
    "made_lines": ("byte_perplexity,none", {"rel": 0.01}),
}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """evaluated(kind, tasks, arguments) -> the results of the harness."""
    manager = TaskManager(include_path=write_tasks(tmp_path_factory.mktemp("tasks")), include_defaults=False)

    def run(kind, tasks, arguments, **settings):
        return lm_eval.simple_evaluate(
            model=kind, model_args=arguments, tasks=tasks, task_manager=manager, log_samples=False, **settings
        )["results"]

    return run


def test_log_likelihoods_and_generation_of_completions(server, evaluated):
    arguments = {
        "model": f"{NAME}:3", "base_url": f"{server.v1}/completions", "tokenizer": str(server.folder),
        "num_concurrent": 1, "max_retries": 1,
    }  # fmt: skip
    found = evaluated("local-completions", [*LIKELIHOODS, "made_lists"], arguments)
    model = bitstrata.load(server.folder, bits=3)
    harness = HFLM(pretrained=model, tokenizer=load_tokenizer(server.folder), batch_size=1)
    own = evaluated(harness, list(LIKELIHOODS), None)
    for task, (number, tolerance) in LIKELIHOODS.items():  # in few digits a server's batches round otherwise
        assert found[task][number] == pytest.approx(own[task][number], **tolerance)
    assert 0 <= found["made_lists"]["exact_match,none"] <= 1


def test_generation_of_chats(server, evaluated):
    arguments = {
        "model": f"{NAME}:3", "base_url": f"{server.v1}/chat/completions", "num_concurrent": 1, "max_retries": 1
    }  # fmt: skip
    found = evaluated("local-chat-completions", ["made_lists"], arguments, apply_chat_template=True)
    assert 0 <= found["made_lists"]["exact_match,none"] <= 1
