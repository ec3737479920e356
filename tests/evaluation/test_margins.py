"""Decision margins against those of dense models, and where the decisions of a chat stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_templates import PLAIN, TOOLS, chat_tokenizer
from test_evaluate import dense_model

import bitstrata
from bitstrata.calibration import Chat
from bitstrata.errors import TextError, UsageError
from bitstrata.evaluation import evaluate
from bitstrata.evaluation.margins import _decisions, _summary

CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
SCHEMA = {"type": "function", "function": {"name": "look", "parameters": {}}}
CALLED = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
FILLED = [{"role": "user", "content": "b?"}, {"role": "assistant", "content": '{"n": 2}'}]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    rows: list[dict[str, Any]] = [{"messages": CALLED, "tools": [SCHEMA]}]
    for number in range(12):
        answer = {"role": "assistant", "content": f'{{"n": {number}}}'}
        rows.append({"messages": [{"role": "user", "content": f"{number * 7}?"}, answer]})
    rows.append({"messages": [{"role": "user", "content": "x" * 90}, FILLED[1]]})  # beyond the context of 64 tokens
    rows.append({"messages": [FILLED[0], {"role": "assistant", "content": "in words"}]})
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_decisions_stand_where_a_call_and_an_answer_in_json_begin() -> None:
    tokenizer = chat_tokenizer(TOOLS)
    found = list(_decisions(tokenizer, Chat((*CALLED, *FILLED), (SCHEMA,))))
    said = [(one.kind, tokenizer.decode(one.ids)) for one in found]
    assert said == [
        ("tool call", "<s>#look=user=a?</s>=assistant=-<"),
        ("tool name", "<s>#look=user=a?</s>=assistant=-<l"),
        ("json", '<s>#look=user=a?</s>=assistant=-<look{"at": 1}></s>=user=b?</s>=assistant=-{'),
    ]
    assert list(_decisions(tokenizer, Chat(({"role": "user", "content": '{"n": 1}'}, FILLED[0])))) == []


def test_margins_are_those_of_the_decoded_models(
    model: Path, quantized: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITSTRATA_KERNEL", "reference")  # others make activations of few rows int8
    tokenizer, loaded = chat_tokenizer(TOOLS), bitstrata.load(quantized, device="cpu", dtype=torch.float32)
    found = evaluate(loaded, bits=[2, 4], reference=model, margins=chats, tokenizer=tokenizer)
    rows = [json.loads(line) for line in chats.read_text().splitlines()]
    prompts = ["<s>=user={}</s>=assistant=-".format(row["messages"][0]["content"]) for row in rows[1:13]]
    asked = {
        "json": [(prompt, "{") for prompt in prompts],
        "tool call": [("<s>#look=user=a?</s>=assistant=-", "<")],
        "tool name": [("<s>#look=user=a?</s>=assistant=-<", "l")],
    }

    @torch.no_grad()
    def margins(bits: int | None, kind: str) -> np.ndarray:
        dense, values = dense_model(model, quantized, bits), []
        for prompt, right in asked[kind]:
            ids = tokenizer.encode(prompt, add_special_tokens=False)
            logits = dense(torch.tensor([ids])).logits[0, -1]
            token = tokenizer.convert_tokens_to_ids(right)
            values.append(float(logits[token] - torch.cat([logits[:token], logits[token + 1 :]]).max()))
        return np.array(values)

    assert found.reference is not None
    assert found.notes == ("1 of 15 decisions lie beyond the model's context of 64 tokens",)
    for bits, given in ((None, found.reference["margins"]), *((int(row.bits), row.margins) for row in found.results)):
        assert given.keys() == asked.keys()
        for kind, row in given.items():
            expected, original = margins(bits, kind), margins(None, kind)
            decided = expected[original > 0]
            assert (row.decisions, row.decided) == (len(expected), len(decided))
            assert row.right == (expected > 0).mean()
            if not len(decided):
                assert (row.median, row.of_reference, row.flipped) == (None, None, None)
                continue
            assert row.median == pytest.approx(np.median(decided), rel=1e-4)
            assert row.of_reference == pytest.approx(np.median(decided) / np.median(original[original > 0]), rel=1e-4)
            assert row.flipped == (decided <= 0).mean()
    assert "decision margins" in str(found)
    assert "tool call" in str(found)


def test_decisions_that_the_original_gets_wrong_are_not_held_against_a_precision() -> None:
    original, here = np.array([4.0, 2.0, -1.0, 1.0]), np.array([2.0, 1.0, 5.0, -3.0])
    (row,) = _summary(["json"] * 4, here, original).values()
    assert (row.decisions, row.decided, row.right, row.median) == (4, 3, 0.75, 1.0)
    assert (row.of_reference, row.flipped) == (0.5, 1 / 3)
    (alone,) = _summary(["json"] * 4, here, None).values()
    assert (alone.decided, alone.median, alone.of_reference, alone.flipped) == (4, 1.5, None, None)
    (never,) = _summary(["json"], here[:1], np.array([-2.0])).values()
    assert (never.decided, never.median, never.of_reference, never.flipped) == (0, None, None, None)


def test_a_template_without_tools_leaves_json(quantized: Path, chats: Path) -> None:
    loaded = bitstrata.load(quantized, device="cpu")
    found = evaluate(loaded, bits=3, margins=str(chats), tokenizer=chat_tokenizer(PLAIN), device="cpu")
    assert found.notes[0] == "the chat template knows no tools: 1 of 15 chats are left out"
    (row,) = found.results
    assert row.margins is not None
    assert row.margins.keys() == {"json"}
    assert (row.margins["json"].of_reference, row.margins["json"].flipped, row.nll) == (None, None, None)
    written = json.loads(json.dumps(found.to_json()))
    assert written["results"][0]["margins"]["json"]["decisions"] == 12
    assert (written["chats"], written["text"], written["reference"]) == (str(chats), None, None)


def test_what_has_no_decisions_is_refused(quantized: Path, text: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="margins are measured on chats"):
        evaluate(quantized, margins=text)
    with pytest.raises(TextError, match="need a chat template"):
        evaluate(quantized, margins=chats)
    (tmp_path / "words.jsonl").write_text(json.dumps({"messages": [FILLED[0]]}))
    with pytest.raises(TextError, match="no chat has a tool call"):
        evaluate(bitstrata.load(quantized), margins=tmp_path / "words.jsonl", tokenizer=chat_tokenizer(PLAIN))


def test_the_built_in_chats_have_decisions_of_every_kind() -> None:
    from bitstrata.calibration import decision_chats

    tokenizer = chat_tokenizer(TOOLS)
    kinds = {one.kind for chat in decision_chats()[:20] for one in _decisions(tokenizer, chat)}
    assert kinds == {"tool call", "tool name", "json"}
