"""Replies that must be something: in mixed batches, in drafts, against a mask made token by token; and hostile ones."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from arithmetic import exact_arithmetic

import bitstrata
from bitstrata import Constraint, Engine, Request
from bitstrata.errors import CheckError, UsageError
from bitstrata.runtime import Finished, Scored, Token
from bitstrata.runtime.batching import masks
from bitstrata.runtime.batching.continuation import Continuation, pick
from bitstrata.runtime.batching.masks import Fitting, Grammars
from bitstrata.runtime.batching.sampling import Sampler, choose

WAIT = 120
VOCABULARY = 100
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["list", "tuple"]},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
CHOICES = ("return", "yield from", 'say "é"')


def is_of_the_schema(text: str) -> bool:
    read = json.loads(text)
    assert list(read) == ["name", "size", "kind"]
    assert type(read["size"]) is int
    return len(read["name"]) <= 8 and 0 <= read["size"] <= 99 and read["kind"] in ("list", "tuple")


CASES = {
    "schema": (Constraint.json_schema(SCHEMA), is_of_the_schema),
    "regex": (Constraint.regex(r"[a-z]{2,5}_\d{3}"), lambda text: re.fullmatch(r"[a-z]{2,5}_\d{3}", text)),
    "choice": (Constraint.choice(CHOICES), lambda text: text in CHOICES),
    "lark": (Constraint.grammar('start: "x" ("+" N)~2\nN: /[0-9]/'), lambda text: re.fullmatch(r"x(\+\d){2}", text)),
    "gbnf": (Constraint.grammar('root ::= "ab" | "c" root'), lambda text: re.fullmatch("c*ab", text)),
}


@pytest.fixture(scope="module")
def engine(bundled, tokenizer):
    with exact_arithmetic():
        own = bitstrata.load(bundled, dtype=torch.float32)
    with Engine(own, tokenizer, max_requests=16) as running:
        yield running


def finished(handle) -> Finished:
    return list(handle.events(WAIT))[-1]


def test_every_kind_in_one_batch_at_several_bits_beside_requests_that_are_free(engine, tokenizer, code, alone):
    handles = []
    for index, (constraint, fits) in enumerate(CASES.values()):
        for temperature in (0.0, 1.0):
            bits = 2 + (index + int(temperature)) % 3
            prompt = code[10 * index : 10 * index + 30]
            request = Request(
                prompt, bits, max_new_tokens=80, temperature=temperature, seed=index, constraint=constraint
            )
            handles.append((engine.submit(request), fits))
    free = [engine.submit(Request(code[:20], bits, max_new_tokens=12, ignore_eos=True)) for bits in (2, 4)]
    ends = engine._eos
    for handle, fits in handles:
        tokens = handle.result(WAIT)
        text = tokenizer.decode([token for token in tokens if token not in ends])
        if handle.request.constraint is CASES["gbnf"][0] and handle.finished.reason == "length":
            assert re.fullmatch("c*a?", text)
            continue
        assert handle.finished.reason == "stop"
        assert fits(text), text
    for handle, bits in zip(free, (2, 4), strict=True):
        assert handle.result(WAIT) == alone(code[:20], bits, 12)


def test_greedy_tokens_are_the_likeliest_of_those_that_fit(engine, model, tokenizer, code):
    """Which tokens fit is found by trying each."""
    pieces = [tokenizer.decode([token]) for token in range(engine.limits.vocabulary)]
    constraint = Constraint.regex("[a-z_ ]{12}")
    for start, bits in ((0, 2), (40, 3), (80, 4)):
        prompt, new, text = code[start : start + 25], [], ""
        while len(text) < 12:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + new]), bits=bits).logits[0, -1]
            fits = [
                token
                for token, piece in enumerate(pieces)
                if token not in engine._eos and re.fullmatch("[a-z_ ]+", piece) and len(text + piece) <= 12
            ]
            new.append(max(fits, key=lambda token: float(logits[token])))
            text += pieces[new[-1]]
        assert engine.submit(Request(prompt, bits, max_new_tokens=20, constraint=constraint)).result(WAIT) == new


def test_log_probabilities_are_those_of_all_tokens(engine, code):
    request = Request(code[:30], 3, max_new_tokens=20, logprobs=3, constraint=CASES["regex"][0])
    events = list(engine.submit(request).events(WAIT))
    tokens = [event for event in events if isinstance(event, Token)]
    again = Request(code[:30] + [token.id for token in tokens], 3, max_new_tokens=0, prompt_logprobs=3)
    (scored,) = [event for event in engine.submit(again).events(WAIT) if isinstance(event, Scored)]
    for token, free in zip(tokens, scored.tokens[30:], strict=True):
        assert token.id == free.id
        assert token.logprob == pytest.approx(free.logprob, abs=1e-3)
        assert [number for number, _ in token.top] == [number for number, _ in free.top]
    assert any(token.id != token.top[0][0] for token in tokens), "nothing was held back"


def test_a_reply_may_be_cut_and_may_end_early(engine, tokenizer, code):
    constraint = Constraint.regex("[ab]{40}")
    cut = engine.submit(Request(code[:20], 4, max_new_tokens=3, constraint=constraint))
    assert re.fullmatch("[ab]{3,39}", tokenizer.decode(cut.result(WAIT)))
    assert cut.finished.reason == "length"
    end = next(iter(engine._eos))
    early = Request(code[:20], 4, max_new_tokens=30, constraint=Constraint.regex("[ab]{2,40}"), logit_bias={end: 100.0})
    tokens = engine.submit(early).result(WAIT)
    assert tokens[-1] in engine._eos, "the model says when, from the shortest whole text on"
    assert len(tokenizer.decode(tokens[:-1])) >= 2


def test_the_constraint_has_the_last_word(engine, tokenizer, code):
    """Of rules that forbid all that it allows."""
    request = Request(
        code[:20], 4, max_new_tokens=9, min_tokens=8, presence_penalty=2.0, constraint=Constraint.choice(["a"])
    )
    handle = engine.submit(request)
    assert tokenizer.decode(handle.result(WAIT)) == "a"
    assert handle.finished.reason == "stop"
    either = Constraint.regex("(a|b)?")
    handle = engine.submit(Request(code[:20], 4, max_new_tokens=9, min_tokens=8, constraint=either))
    assert tokenizer.decode(handle.result(WAIT)) in ("a", "b"), "what the rules leave comes first"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("case", ["schema", "regex", "choice"])
def test_drafts_are_held_to_it_too(bundled, model, tokenizer, case, temperature):
    constraint, fits = CASES[case]
    settings = {"bits": 4, "max_new_tokens": 80, "temperature": temperature, "tokenizer": tokenizer}
    plain = bitstrata.generate(model, "def area(width):", constraint=constraint, **settings)
    drafted = bitstrata.generate(model, "def area(width):", constraint=constraint, draft_bits=2, **settings)
    assert fits(plain.text)
    assert fits(drafted.text)
    assert temperature or drafted.text == plain.text


def test_a_mask_follows_its_tokens_forth_and_back(engine, tokenizer, code):
    grammars = Grammars(tokenizer, engine.limits.vocabulary, engine._eos)
    constraint, text = CASES["schema"][0], '{"name": "x", "size": 12, "kind": "list"}'
    tokens = [*code[:5], *tokenizer.encode(text, add_special_tokens=False)]

    def fitting(mask, tokens):
        return mask.fitting(tokens, engine.limits.vocabulary).apply(torch.zeros(1, engine.limits.vocabulary))

    mask = grammars.mask(constraint, 5)
    other = [*code[:5], *tokenizer.encode('{"name": "yz', add_special_tokens=False)]
    for length in (5, 9, 7, len(tokens), 6, 12, 12, 5):
        fresh = grammars.mask(constraint, 5)
        assert torch.equal(fitting(mask, tokens[:length]), fitting(fresh, tokens[:length]))
        assert torch.equal(fitting(mask, other), fitting(grammars.mask(constraint, 5), other))
    assert mask.is_over(tokens)
    assert not mask.is_over(tokens[:-1])
    end = next(iter(engine._eos))
    assert mask.is_over([*tokens, end])
    assert not mask.is_over(tokens[:7])
    with pytest.raises(CheckError, match="cannot be held to its constraint"):
        fitting(mask, [*code[:5], *tokenizer.encode("]", add_special_tokens=False)])


@pytest.mark.parametrize("case", CASES)
def test_a_token_is_admitted_if_and_only_if_it_fits(engine, tokenizer, seed, case):
    """On the way of random replies, all tokens of the vocabulary."""
    numbers, vocabulary = random.Random(seed), engine.limits.vocabulary
    mask = Grammars(tokenizer, vocabulary, engine._eos).mask(CASES[case][0], 1)
    for _ in range(4):
        tokens = [0]
        while len(tokens) < 12 and not mask.is_over(tokens):
            allowed = mask.fitting(tokens, vocabulary).apply(torch.zeros(1, vocabulary))[0].isfinite().tolist()
            assert [mask.admits(tokens, token) for token in range(vocabulary)] == allowed
            tokens.append(numbers.choice([token for token in range(vocabulary) if allowed[token]]))
        assert len(tokens) == 12 or mask.admits(tokens, 5), "behind the end everything may come"


class Fits:
    """A mask that allows `tokens`, whatever came before."""

    def __init__(self, tokens):
        self.tokens = tokens

    def fitting(self, _, vocabulary):
        return Fitting(np.isin(np.arange(vocabulary), self.tokens))

    def admits(self, _, token):
        return token in self.tokens


@pytest.mark.parametrize("few", [0, 1, 5, VOCABULARY])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_token_is_picked_as_if_all_others_were_impossible(monkeypatch, seed, few, temperature):
    """Rows that allow one token, some, most, beside one that is free; what is forbidden may even be no number."""
    monkeypatch.setattr(masks, "FEW", few)
    generator = torch.Generator().manual_seed(seed)
    allowed = [[17], [3, 40, 41, 90], list(range(0, VOCABULARY, 2)), list(range(1, VOCABULARY)), None]
    for draw in range(20):
        logits = 3 * torch.randn(len(allowed), VOCABULARY, generator=generator)
        forbidden = torch.tensor([[t is not None and v not in t for v in range(VOCABULARY)] for t in allowed])
        plain = choose(
            logits.masked_fill(forbidden, -torch.inf),
            [Sampler(temperature, 0.95, random.Random(draw), None, 20) for _ in allowed],
        )
        items = [
            Continuation([1], 9, Sampler(temperature, 0.95, random.Random(draw), 2, 20), mask=tokens and Fits(tokens))
            for tokens in allowed
        ]
        found = pick(logits.clone(), items)
        assert [token.id for token in found] == [token.id for token in plain]
        for row, token in enumerate(found):
            own = logits[row].log_softmax(-1)
            assert token.logprob == float(own[token.id])
            assert [number for number, _ in token.top] == own.topk(2).indices.tolist()
        poisoned = [replace(item, sampler=Sampler(0.0, 1.0, random.Random(0))) for item in items]
        assert [token.id for token in pick(logits.masked_fill(forbidden, torch.nan), poisoned)] == (
            logits.masked_fill(forbidden, -torch.inf).argmax(-1).tolist()
        )


@pytest.mark.parametrize("few", [0, VOCABULARY])
def test_where_nothing_usable_is_left_the_request_is_told(monkeypatch, few):
    monkeypatch.setattr(masks, "FEW", few)
    logits = torch.zeros(2, VOCABULARY)
    logits[1, 5] = torch.nan
    items = [Continuation([1], 9, Sampler(0.5, 1.0, random.Random(0)), mask=Fits(fits)) for fits in ([], [4, 5])]
    assert [type(found) for found in pick(logits, items)] == [CheckError, CheckError]


def deep(levels: int) -> dict:
    made: dict = {"type": "string"}
    for _ in range(levels):
        made = {"type": "array", "items": made}
    return made


HOSTILE = {
    "no regex": (lambda: Constraint.regex("[a"), "unclosed character class"),
    "look-around": (lambda: Constraint.regex("(?=a)b"), "look-around"),
    "a long regex": (lambda: Constraint.regex("a" * 40_000), "40000 characters"),
    "an exponential regex": (lambda: Constraint.regex("(((a{0,900}){0,900}){0,900}){0,900}b{900}" * 40), None),
    "nested parentheses": (lambda: Constraint.grammar("start: " + "(" * 9000 + '"a"' + ")" * 9000), "nested"),
    "many terminals": (
        lambda: Constraint.grammar("start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(900))),
        "900 terminals",
    ),
    "doubling terminals": (
        lambda: Constraint.grammar(
            "start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(60)) + '\nR60: "a"'
        ),
        "too big",
    ),
    "no rule": (lambda: Constraint.grammar("start: missing"), "missing"),
    "no grammar": (lambda: Constraint.grammar("root ::= ("), "the grammar cannot be used"),
    "a type that is none": (lambda: Constraint.json_schema({"type": "foo"}), "Invalid type: foo"),
    "a keyword that cannot be enforced": (lambda: Constraint.json_schema({"not": {"type": "null"}}), "Unimplemented"),
    "nothing fits": (lambda: Constraint.json_schema({"minimum": 5, "maximum": 3, "type": "integer"}), "minimum"),
    "false": (lambda: Constraint.json_schema(False), "JSON schema cannot be used"),
    "a reference to elsewhere": (lambda: Constraint.json_schema({"$ref": "http://x.example/y"}), "http://x.example/y"),
    "a deep schema": (lambda: Constraint.json_schema(deep(70)), "64 deep"),
    "a large schema": (lambda: Constraint.json_schema({"enum": ["x" * 100] * 9000}), "characters"),
    "a product of alternatives": (
        lambda: Constraint.json_schema(
            {"allOf": [{"anyOf": [{"required": [f"{a}{i}"]} for a in "abcdef"]} for i in range(12)]}
        ),
        "JSON schema",
    ),
    "no JSON": (lambda: Constraint.json_schema({"enum": [float("nan")]}), "no JSON"),
    "a list": (lambda: Constraint.json_schema([1]), "not list"),
    "no choice": (lambda: Constraint.choice([]), "at least one text"),
    "half a character": (lambda: Constraint.choice(["\ud800"]), "surrogate"),
    "a text": (lambda: "yes|no", "not str"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_cannot_be_used_is_refused_in_words(engine, code, case):
    make, said = HOSTILE[case]
    if said is None:  # it may be taken: what it costs is bounded
        engine.submit(Request(code[:9], 2, max_new_tokens=3, constraint=make())).cancel()
        return
    with pytest.raises(UsageError, match=re.escape(said)):
        engine.submit(Request(code[:9], constraint=make()))


def test_one_that_takes_too_much_on_the_way_ends_alone(engine, code, alone):
    many = Constraint.json_schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2500)}})
    ended = engine.submit(Request(code[:20], 2, max_new_tokens=30, constraint=many))
    other = engine.submit(Request(code[:20], 2, max_new_tokens=12, ignore_eos=True))
    last = finished(ended)
    assert last.reason == "error"
    assert isinstance(last.error, CheckError)
    assert "cannot be held to its constraint" in str(last.error)
    assert other.result(WAIT) == alone(code[:20], 2, 12)


def test_what_is_not_enforced_is_said(engine):
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "string", "format": "colour"}}
    assert engine.prepare(Constraint.json_schema(schema, strict=False)) == (
        'Unimplemented keys: ["uniqueItems"]',
        "Unknown format: colour",
    )
    assert engine.prepare(CASES["schema"][0]) == ()
    with pytest.raises(UsageError, match="uniqueItems"):
        engine.prepare(Constraint.json_schema(schema))


def test_what_does_not_go_together(model, engine, code):
    with pytest.raises(UsageError, match="ignore_eos"):
        engine.submit(Request(code[:9], constraint=CASES["regex"][0], ignore_eos=True))
    with pytest.raises(UsageError, match="tokenizer"):
        Grammars(None, 10, [0]).mask(CASES["regex"][0], 0)
    with pytest.raises(UsageError, match="end-of-sequence"):
        Grammars(engine._tokenizer, engine.limits.vocabulary, []).mask(CASES["regex"][0], 0)


def test_white_space_is_what_was_asked_for(engine, tokenizer):
    grammars = Grammars(tokenizer, engine.limits.vocabulary, engine._eos)
    schema = {"type": "array", "items": {"enum": [1]}}
    for whitespace, fitting, other in (
        (None, "[1,1]", "[ 1]"),
        ("[ ]{2}", "[  1  ,1  ]", "[ 1]"),
        ("[ ]?", "[ 1]", "[  1]"),
    ):
        mask = grammars.mask(Constraint.json_schema(schema, whitespace=whitespace), 0)
        assert mask.is_over(tokenizer.encode(fitting, add_special_tokens=False))
        with pytest.raises(CheckError):
            mask.is_over(tokenizer.encode(other, add_special_tokens=False))
