"""`bitstrata generate`."""

from __future__ import annotations

import typer
from transformers import TextStreamer

from ..models import encode_prompt, load_tokenizer, resolve
from ..options import GenerateCommand
from ..plans import choose_bits, parse_bits_or_plan
from ..runtime import generate, policy_of
from .output import show, writing_stdout
from .sizing import load_sized


class _Stream(TextStreamer):
    """Text on stdout as it comes."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        with writing_stdout():
            super().on_finalized_text(text, stream_end)


def run(options: GenerateCommand) -> None:
    policy_of(options)  # refused before a model is loaded
    target, chosen = choose_bits(options.model, None if options.bits is None else parse_bits_or_plan(options.bits))
    context = None
    if options.fit:
        tokenizer = load_tokenizer(resolve(target, hub=options.hub, weights=False))
        context = len(encode_prompt(tokenizer, options.prompt)) + options.max_new_tokens
    most = chosen if isinstance(chosen, int) else None
    loaded = load_sized(target, chosen, options, context=context, max_bits=most)
    tokenizer = load_tokenizer(resolve(target, hub=options.hub, weights=False))
    result = generate(
        loaded,
        options.prompt,
        bits=chosen,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        draft_bits=options.draft_bits,
        draft_tokens=options.draft_tokens,
        tokenizer=tokenizer,
        kv_cache_dtype=options.kv_cache_dtype,
        policy=options.policy,
        min_bits=options.min_bits,
        streamer=None if options.json else _Stream(tokenizer, skip_special_tokens=True),
    )
    if options.json:
        show(result, as_json=True)
        return
    speed = "" if result.tokens_per_second is None else f", {result.tokens_per_second:.1f} tokens/s"
    drafted = f"of drafts at {options.draft_bits} bits accepted"
    accepted = "" if result.acceptance is None else f", {result.acceptance:.0%} {drafted}"
    typer.echo(f"[{result.precision}, {result.tokens} tokens{speed}{accepted}]", err=True)
