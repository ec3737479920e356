"""The policy by structure where texts are made: in mixed batches, held to grammars, in drafts, in a conversation."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from arithmetic import exact_arithmetic
from switched import switching

import bitstrata
from bitstrata import Constraint, Conversation, Engine, Request
from bitstrata.errors import UnsupportedBitsError, UsageError
from bitstrata.models import DraftLength
from bitstrata.runtime import StructurePolicy, Token
from bitstrata.runtime.batching.masks import Grammars
from bitstrata.runtime.passages import PassageReader

WAIT = 120
NEW = 40
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "kind": {"enum": ["list", "tuple"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}


def expected_bits(tokenizer, prompt, tokens, high=4, low=2):
    """Of each of the new `tokens` of a free reply; the first is the prompt's."""
    reader = PassageReader(tokenizer).begin(prompt)
    bits = []
    for token in tokens:
        bits.append(high if not bits or reader.passage in ("structure", "opening") else low)
        reader.push(token)
    return bits


@pytest.fixture(scope="module")
def engine(bundled, tokenizer):
    with exact_arithmetic():
        own = bitstrata.load(bundled, dtype=torch.float32)
    with Engine(own, tokenizer, max_requests=16, policy=StructurePolicy()) as running:
        yield running


def events_of(handle):
    return [event for event in handle.events(WAIT) if isinstance(event, Token)]


def test_free_replies_run_at_the_bits_of_their_text_in_any_company(engine, model, tokenizer, code):
    prompts = [code[start : start + length] for start, length in [(0, 20), (60, 7), (100, 50), (170, 33)]]
    prompts.append(tokenizer.encode("It is:\n```python\nfor", add_special_tokens=False))
    handles = [
        engine.submit(Request(prompt, bits, min_bits, max_new_tokens=NEW, ignore_eos=True))
        for prompt in prompts
        for bits, min_bits in [(4, 2), (3, 2), (4, None)]
    ]
    used = Counter()
    for handle in handles:
        request, events = handle.request, events_of(handle)
        bits = [event.bits for event in events]
        tokens = [event.id for event in events]
        low = request.min_bits or request.bits
        assert bits == expected_bits(tokenizer, request.prompt_ids, tokens, request.bits, low)
        assert tokens == switching(model, request.prompt_ids, bits)
        used.update(bits)
    assert used.keys() == {2, 3, 4}
    fenced = [event.bits for event in events_of(handles[-3])]
    assert set(fenced) == {4}, "the prompt left a block of code open"


def mending(model, prompt, tokens, bits):
    """Greedy tokens, where each pass at 4 bits computes all before it anew: 2 bits reach from there to the next."""
    found, ids = [], [*prompt, *tokens]
    for made, value in enumerate(bits):
        since = max((place for place in range(made + 1) if bits[place] == 4), default=0)  # the last pass at 4 bits
        rows = [4] * (len(prompt) + since) + [2] * (made - since)
        rows[-1] = value
        with torch.no_grad():
            logits = model(torch.tensor([ids[: len(rows)]]), bits=torch.tensor([rows], dtype=torch.int8)).logits
        found.append(int(logits[0, -1].argmax()))
    return found


def test_mended_replies_decide_as_if_no_token_had_been_lowered(model, bundled, tokenizer, code):
    with exact_arithmetic():
        own = bitstrata.load(bundled, dtype=torch.float32)
    prompts = [code[start : start + length] for start, length in [(0, 20), (60, 7), (100, 50), (170, 33)]]
    with Engine(own, tokenizer, policy=StructurePolicy(mend=1)) as engine:
        handles = [engine.submit(Request(prompt, 4, 2, NEW, ignore_eos=True)) for prompt in prompts]
        made = [events_of(handle) for handle in handles]
    for prompt, events in zip(prompts, made, strict=True):
        tokens, bits = [event.id for event in events], [event.bits for event in events]
        assert bits == expected_bits(tokenizer, prompt, tokens)
        assert tokens == mending(model, prompt, tokens, bits)
    text = tokenizer.decode(code[:30])
    alone = bitstrata.generate(own, text, 4, NEW, tokenizer=tokenizer, policy="structure:mend=1")
    tokens = tokenizer(alone.text, add_special_tokens=False).input_ids
    prompt = tokenizer(text).input_ids
    bits = expected_bits(tokenizer, prompt, tokens)
    assert tokens == mending(model, prompt, tokens, bits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_under_a_grammar_tokens_that_it_leaves_no_choice_are_made_at_low_bits(engine, tokenizer, code, temperature):
    constraint = Constraint.json_schema(SCHEMA)
    free = [engine.submit(Request(code[:9], bits, max_new_tokens=NEW, ignore_eos=True)) for bits in (2, 3)]
    handles = [
        engine.submit(Request(code[at : at + 30], 4, 2, 80, temperature, seed=at, constraint=constraint))
        for at in range(0, 60, 10)
    ]
    grammars = Grammars(tokenizer, engine.limits.vocabulary, engine._eos)
    forced = 0
    for handle in handles:
        events = events_of(handle)
        tokens, mask = list(handle.request.prompt_ids), grammars.mask(constraint, len(handle.request.prompt_ids))
        for number, event in enumerate(events):
            is_forced = number > 0 and mask.is_forced(tokens)
            assert event.bits == (2 if is_forced else 4)
            if is_forced:
                logits = torch.zeros(1, engine.limits.vocabulary)
                allowed = mask.fitting(tokens, engine.limits.vocabulary).apply(logits).isfinite()
                assert allowed.sum() < 20
                forced += 1
            tokens.append(event.id)
        made = [event.id for event in events if event.id not in engine._eos]
        assert json.loads(tokenizer.decode(made)).keys() == {"name", "kind"}
    assert forced > 2 * len(handles)
    for handle, bits in zip(free, (2, 3), strict=True):
        assert {event.bits for event in events_of(handle)} == {bits}


def test_a_forced_text_is_the_only_one(tokenizer):
    """However tokens cut it: what a mask allows there is a beginning of it."""
    constraint = Constraint.regex(r"(yes|no), because return values are [0-9]")
    ends = frozenset([tokenizer.eos_token_id])
    mask = Grammars(tokenizer, len(tokenizer), ends).mask(constraint, 0)
    tokens = tokenizer.encode("yes, because return values are 7", add_special_tokens=False)
    seen = []
    for count in range(len(tokens)):
        before, rest = tokenizer.decode(tokens[:count]), tokenizer.decode(tokens[count:])
        seen.append(mask.is_forced(tokens[:count]))
        if seen[-1]:
            fitting = mask.fitting(tokens[:count], len(tokenizer))
            allowed = fitting.apply(torch.zeros(1, len(tokenizer))).isfinite()[0].nonzero()[:, 0].tolist()
            assert all(rest.startswith(tokenizer.decode([token])) for token in allowed), before
    assert not seen[0]
    assert not seen[-1]
    assert any(seen)
    assert not mask.is_forced(tokens), "it has ended"


def test_a_request_on_a_plan_is_left_alone(engine, code):
    plan = dict.fromkeys(engine.limits.state.layers, 3)
    handle = engine.submit(Request(code[:20], plan, max_new_tokens=12, ignore_eos=True))
    assert {event.bits for event in events_of(handle)} == {None}


def test_without_a_tokenizer_there_is_nothing_to_read(model):
    with pytest.raises(UsageError, match="structure reads what the model writes"):
        Engine(model, policy=StructurePolicy())


def test_what_was_made_at_other_bits_is_computed_anew(model, bundled, tokenizer, code):
    """The next turn takes up the prompt, and what came before the first lowered token."""
    with exact_arithmetic():
        own = bitstrata.load(bundled, dtype=torch.float32)
    with Engine(own, tokenizer, policy=StructurePolicy()) as engine:
        prompt = code[:60]
        first = events_of(engine.submit(Request(prompt, 4, 2, NEW, ignore_eos=True)))
        lowered = next(place for place, event in enumerate(first) if event.bits == 2)
        again = [*prompt, *(event.id for event in first), *code[:30]]
        second = engine.submit(Request(again, 4, 2, 4, ignore_eos=True))
        made = events_of(second)
        assert second.reused_tokens == len(prompt) + lowered - 1
        assert [event.id for event in made] == switching(model, again, [event.bits for event in made])


# one text


def test_generate_follows_the_same_policy_and_says_at_what_bits(model, tokenizer, code):
    prompt = tokenizer.decode(code[:40])
    ids = tokenizer(prompt).input_ids
    made = bitstrata.generate(model, prompt, 4, NEW, tokenizer=tokenizer, policy="structure", min_bits=2)
    bits = switching_bits(model, tokenizer, ids)
    assert made.text == tokenizer.decode(switching(model, ids, bits), skip_special_tokens=True)
    assert made.tokens_by_bits == {str(value): count for value, count in sorted(Counter(bits).items())}
    assert made.precision == f"2 to 4 bits ({bits.count(2)} at 2, {bits.count(4)} at 4)"
    assert bitstrata.generate(model, prompt, 4, NEW, tokenizer=tokenizer, policy="structure").text == made.text
    plain = bitstrata.generate(model, prompt, 3, 8, tokenizer=tokenizer)
    assert (plain.tokens_by_bits, plain.precision) == ({"3": 8}, "3 bits")


def switching_bits(model, tokenizer, ids):
    """What a policy by structure must give NEW greedy tokens, found token by token."""
    tokens, bits = [], [4]
    while len(tokens) < NEW:
        tokens = switching(model, ids, bits)
        if tokens[-1] == tokenizer.eos_token_id or len(bits) == NEW:
            break
        bits = expected_bits(tokenizer, ids, [*tokens, 0])
    return bits


def test_drafts_are_made_where_bits_are_not_lowered_and_checked_at_them(model, tokenizer, code, monkeypatch):
    monkeypatch.setattr(DraftLength, "next", lambda self: self.most)
    prompt = tokenizer.decode(code[:40])
    ids = tokenizer(prompt).input_ids
    made = bitstrata.generate(
        model, prompt, 4, NEW, tokenizer=tokenizer, policy="structure", draft_bits=2, draft_tokens=3
    )
    tokens = tokenizer(made.text, add_special_tokens=False).input_ids
    assert model.speculation.drafted > 0
    assert made.tokens_by_bits.keys() == {"2", "4"}
    low = expected_bits(tokenizer, ids, tokens).count(2)
    assert 0 < made.tokens_by_bits["2"] <= low, "no token runs lower than without drafts"


def test_a_conversation_follows_the_policy_until_its_bits_leave_no_choice(bundled, tokenizer):
    with exact_arithmetic():
        own = bitstrata.load(bundled, dtype=torch.float32)
    talk = Conversation(own, tokenizer, max_new_tokens=NEW, policy="structure:prose=3", min_bits=2)
    assert talk.reply("def first(items):\n").tokens_by_bits.keys() == {"3", "4"}
    talk.bits = 2
    assert talk.reply("\ndef second(items):\n").tokens_by_bits.keys() == {"2"}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"policy": "load:target_ms=5"}, UsageError, "looks at many requests"),
        ({"policy": "entropy", "draft_bits": 2}, UsageError, "which drafts skip"),
        ({"policy": "structures"}, UsageError, "is not known"),
        ({"min_bits": 2}, UsageError, "needs a policy"),
        ({"policy": "structure", "min_bits": 7}, UnsupportedBitsError, "7"),
        ({"policy": "structure", "min_bits": 4, "bits": 3}, UsageError, "above"),
    ],
    ids=["load", "entropy in drafts", "unknown", "no policy", "bits that there are not", "above"],
)
def test_what_one_text_cannot_have_is_refused(model, tokenizer, settings, error, message):
    with pytest.raises(error, match=message):
        bitstrata.generate(model, "def", tokenizer=tokenizer, **settings)


def test_a_plan_cannot_be_lowered(model, tokenizer):
    plan = bitstrata.Plan(dict.fromkeys(bitstrata.layers(model), 3))
    with pytest.raises(UsageError, match="cannot lower a plan"):
        bitstrata.generate(model, "def", plan, tokenizer=tokenizer, policy="structure")


@pytest.mark.parametrize("policy", ["position:tokens=5", "entropy:low=0.9,high=1,hold=2"])
def test_the_other_policies_choose_for_one_text_what_they_choose_in_an_engine(bundled, tokenizer, code, policy):
    prompt = tokenizer.decode(code[:40])
    with exact_arithmetic():
        own = bitstrata.load(bundled, dtype=torch.float32)
    alone = bitstrata.generate(own, prompt, 4, 20, tokenizer=tokenizer, policy=policy)
    with Engine(own, tokenizer, policy=bitstrata.runtime.parse_policy(policy)) as engine:
        events = events_of(engine.submit(Request(tokenizer(prompt).input_ids, 4, 2, 20)))
    assert alone.text == tokenizer.decode([event.id for event in events], skip_special_tokens=True)
    assert alone.tokens_by_bits == {
        str(bits): count for bits, count in sorted(Counter(event.bits for event in events).items())
    }
