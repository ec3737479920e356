"""What a policy by structure keeps of the decision margins, at how many bits a token on average.

Replies that call a tool or answer in JSON are made step by step, as `generate` makes them, but of known tokens: all at
the same bits, or at those that a policy chooses from the reply so far. At the token that opens the structure, and at
the first of a tool's name,

    margin = logit(the right token) - the largest logit of any other

    python benchmarks/structure.py OUT --reference MODEL [--policies structure structure:mend=1] [--kinds tool,json]
        [--replies at-once,behind-words] [--chats 16] [--threads N] [--json FILE]

The chats are the built-in held-out ones, each behind another one of its kind, which shows what is wanted. Models whose
template knows no tools are told of them in words. at-once: a reply is the structure alone. behind-words: two sentences
and a line's end come first, in the example too. held: a grammar holds the reply (a call of the tools, or a JSON
schema), so that tokens to which it leaves no choice are at low bits. Of the decisions that the original gets right: the
median of their margins, as a part of the original's too, and the share that is no longer right (flipped). kld: of all
tokens of these replies, to the original. bits: the mean over these tokens; a prompt is at the highest in every policy.
The mix is of built-in chats, of which three in five are explanations in words; nothing is computed for its bits.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

import bitstrata
from bitstrata.benchmark.machine import describe
from bitstrata.calibration import Chat, decision_chats
from bitstrata.calibration.made_chats import made_chats
from bitstrata.metrics import Tally
from bitstrata.models import encode_turns, end_tokens, load_tokenizer
from bitstrata.nn import bits_state
from bitstrata.runtime import Constraint, Policy, parse_policy
from bitstrata.runtime.batching import Lowerings, Sampler, Session, session_of
from bitstrata.runtime.passages import PassageReader
from bitstrata.runtime.policy import RequestView
from bitstrata.runtime.tools import Tool, forced_calls, shown_turns
from bitstrata.tables import render

WORDS = {
    "tool": "I can help you with that. Let me look it up for you.\n",
    "json": "I have read this with care. Here is the answer as JSON:\n",
}
MIX = 200  # chats


@dataclass(frozen=True)
class Reply:
    """decided: place in `new` -> kind of the decision. held: what a grammar would hold it to."""

    prompt: list[int]
    new: list[int]
    decided: dict[int, str]
    held: Constraint | None = None


def replies(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat], *, words: bool) -> Iterator[Reply]:
    """One reply of each chat, behind the one before it of its kind."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    examples: dict[str, Chat] = {}
    for chat in chats:
        kind = "tool" if chat.tools else "json"
        example, examples[kind] = examples.get(kind), chat
        if example is None:
            continue
        before = WORDS[kind] if words else ""
        tools = [Tool(**one["function"]) for one in chat.tools]
        turns: list[Any] = []
        asked = 1 if kind == "tool" else 3  # turns of a chat up to what is asked
        for message in [*example.messages, *chat.messages[:asked]]:
            is_structure = message["role"] == "assistant" and (message.get("tool_calls") or kind == "json")
            turns.append({**message, "content": before + message["content"]} if is_structure else message)
        shown, variables, _ = shown_turns(tokenizer, turns, tools)
        prompt = encode_turns(tokenizer, shown, variables=variables)
        wanted = chat.messages[asked]
        opened = len(ids(before))
        if kind == "tool":
            call = wanted["tool_calls"][0]["function"]
            first = ids('<tool_call>\n{"name": "')
            rest = ids(f'{call["name"]}", "arguments": {json.dumps(call["arguments"])}}}\n</tool_call>')
            held = None if words else forced_calls(tokenizer, shown_turns(tokenizer, [], tools)[2], tools, most=1)
            yield Reply(
                prompt, [*ids(before), *first, *rest], {opened: "tool call", opened + len(first): "tool name"}, held
            )
            continue
        value = json.loads(wanted["content"])
        kinds = {str: "string", int: "integer"}
        schema = {
            "type": "object",
            "properties": {key: {"type": kinds[type(one)]} for key, one in value.items()},
            "required": list(value),
            "additionalProperties": False,
        }
        held = None if words else Constraint.json_schema(schema)
        yield Reply(prompt, [*ids(before), *ids(wanted["content"])], {opened: "json"}, held)


class Ways:
    """Replies made by the steps of `generate`, whatever the model would have said."""

    def __init__(self, own: Session, tokenizer: PreTrainedTokenizerBase) -> None:
        self._own, self._tokenizer = own, tokenizer
        self.state = bits_state(own.model)
        self._ends = end_tokens(own.model, tokenizer)

    def follow(self, reply: Reply, bits: int, policy: Policy | None, *, held: bool = False) -> tuple[Tensor, list[int]]:
        """What each token of the reply is picked from, [new, V] float32, and its bits."""
        seen: list[Tensor] = []

        def said(tokens: Tensor, logits: Tensor) -> Tensor:
            seen.append(logits[0].clone())
            only = torch.full_like(logits, -torch.inf)
            only[0, reply.new[len(seen) - 1]] = 0.0
            return only

        asked, low = self.state.resolve(bits), min(self.state.supported)
        lowering = None if policy is None else Lowerings(policy, self.state, self._tokenizer).of(reply.prompt, low)
        mask = None
        if held and reply.held is not None:
            mask = self._own.mask(reply.held, self._tokenizer, len(reply.prompt), self._ends)
        sampler = Sampler(0.0, 1.0, random.Random(0))
        item = self._own.start(reply.prompt, asked, most=len(reply.new), sampler=sampler, rules=said, mask=mask)
        used = [self._own.step(item, asked, lowering).bits for _ in reply.new]
        assert item.new == reply.new, "the grammar does not take this reply"
        self._own.finish(item)
        return torch.stack(seen), [one for one in used if one is not None]


def exact(original: Any, reply: Reply) -> Tensor:
    """The same of the original."""
    ids = torch.tensor([[*reply.prompt, *reply.new[:-1]]])
    logits: Tensor = original(ids, use_cache=False, logits_to_keep=len(reply.new)).logits[0].float()
    return logits


def margin(logits: Tensor, token: int) -> float:
    others = logits.clone()
    others[token] = -torch.inf
    return float(logits[token] - others.max())


def measure(
    original: Any, ways: Ways, found: Sequence[Reply], named: dict[str, tuple[int, Policy | None, bool]]
) -> dict[str, dict[str, Any]]:
    """Of each way, and of the original, the margins by kind, the divergence and the bits."""
    margins: dict[str, dict[str, list[float]]] = {name: {} for name in ("original", *named)}
    tallies = {name: Tally() for name in named}
    counts: dict[str, Counter[int]] = {name: Counter() for name in named}
    for number, reply in enumerate(found):
        base = exact(original, reply)
        for name in margins:
            logits = base
            if name in named:
                bits, policy, held = named[name]
                logits, used = ways.follow(reply, bits, policy, held=held)
                counts[name].update(used)
                tallies[name].add(logits, torch.tensor(reply.new), base)
            for place, kind in reply.decided.items():
                margins[name].setdefault(kind, []).append(margin(logits[place], reply.new[place]))
        print(f"{number + 1} of {len(found)} replies", file=sys.stderr)
    rows: dict[str, dict[str, Any]] = {}
    for name, kinds in margins.items():
        kld = tallies[name].result().kld if name in named else None
        rows[name] = {"kld": kld, "mean_bits": mean_bits(counts[name]) if name in named else None, "margins": {}}
        for kind, values in kinds.items():
            right = [place for place, value in enumerate(margins["original"][kind]) if value > 0]
            here = [values[place] for place in right]
            whole = statistics.median(margins["original"][kind][place] for place in right) if right else None
            rows[name]["margins"][kind] = {
                "decisions": len(values),
                "decided": len(right),
                "median": statistics.median(here) if right else None,
                "of_reference": statistics.median(here) / whole if whole else None,
                "flipped": sum(value <= 0 for value in here) / len(here) if right else None,
            }
    return rows


def mixed_replies(tokenizer: PreTrainedTokenizerBase) -> Iterator[Reply]:
    """All replies of a mix of chats."""
    for chat in made_chats("heldout")[:MIX]:
        turns, variables, _ = shown_turns(tokenizer, chat.messages, [Tool(**one["function"]) for one in chat.tools])
        for place, turn in enumerate(turns):
            if turn["role"] == "assistant":
                text = encode_turns(tokenizer, turns[: place + 1], variables=variables, generation_prompt=False)
                prompt = encode_turns(tokenizer, turns[:place], variables=variables)
                yield Reply(prompt, text[len(prompt) :], {})


def bits_by_text(policy: Policy, reply: Reply, reader: PassageReader, supported: tuple[int, ...]) -> Iterator[int]:
    """What the policy gives the tokens of a free reply."""
    steps, reading = policy.start(), reader.begin(reply.prompt)
    for made, token in enumerate(reply.new):
        passage = reading.passage if made else None
        view = RequestView(max(supported), min(supported), supported, made, passage=passage)
        yield view.lowered(steps(view))
        reading.push(token)


def mean_bits(counts: Counter[int]) -> float:
    return sum(bits * count for bits, count in counts.items()) / counts.total()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--reference", required=True)
    parser.add_argument("--policies", nargs="*", default=["structure", "structure:mend=1"])
    parser.add_argument("--kinds", default="tool,json")
    parser.add_argument("--replies", default="at-once,behind-words")
    parser.add_argument("--chats", type=int, default=16, help="of each kind")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(Path(args.model))
    model = bitstrata.load(args.model, dtype=torch.float32)
    original = AutoModelForCausalLM.from_pretrained(args.reference, dtype=torch.float32)
    supported, high = bits_state(model).supported, max(bits_state(model).supported)
    # the two kinds alternate, and the first of each is an example
    chats = [chat for chat in decision_chats() if ("tool" if chat.tools else "json") in args.kinds.split(",")]
    chats = chats[: (args.chats + 1) * len(args.kinds.split(","))]
    policies = {text: parse_policy(text) for text in args.policies}
    report: dict[str, Any] = {
        "machine": describe(torch.get_num_threads()),
        "settings": {
            "model": Path(args.model).name,
            "reference": Path(args.reference).name,
            "chats": args.chats,
            "kinds": args.kinds,
        },
        "replies": {},
        "mix": {},
    }
    reader, mix = PassageReader(tokenizer), list(mixed_replies(tokenizer))
    for text, policy in policies.items():
        counts = Counter(bits for reply in mix for bits in bits_by_text(policy, reply, reader, supported))
        report["mix"][text] = {"tokens": counts.total(), "mean_bits": mean_bits(counts)}
        print(f"{text}: {mean_bits(counts):.2f} bits a token of a mix of {len(mix)} replies", file=sys.stderr)
    named: dict[str, tuple[int, Policy | None, bool]] = {f"{bits} bits": (bits, None, False) for bits in supported}
    named |= {text: (high, policy, False) for text, policy in policies.items()}
    with torch.no_grad(), session_of(model) as own:
        ways = Ways(own, tokenizer)
        for where in args.replies.split(","):
            words = where == "behind-words"
            held = {} if words else {f"{text}, held": (high, policy, True) for text, policy in policies.items()}
            found = list(replies(tokenizer, chats, words=words))
            report["replies"][where] = rows = measure(original, ways, found, {**named, **held})
            print(table(where, rows), file=sys.stderr)
    text = json.dumps(report, indent=2)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


def table(where: str, rows: dict[str, dict[str, Any]]) -> str:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    kinds = list(rows["original"]["margins"])
    columns = [
        "way",
        "bits",
        "kld",
        *(f"{kind} {what}" for kind in kinds for what in ("median", "part", "flipped")),
    ]
    cells = [
        [
            name,
            shown(row["mean_bits"], ".2f"),
            shown(row["kld"], ".4f"),
            *(
                shown(row["margins"][kind][what], form)
                for kind in kinds
                for what, form in (("median", ".2f"), ("of_reference", ".2f"), ("flipped", ".0%"))
            ),
        ]
        for name, row in rows.items()
    ]
    decided = {kind: f"{one['decided']} of {one['decisions']}" for kind, one in rows["original"]["margins"].items()}
    return render(f"{where}; the original gets right {decided}", columns, cells)


if __name__ == "__main__":
    main()
