"""`bitstrata generate`."""

from __future__ import annotations

from typing import Annotated

import typer
from transformers import TextStreamer

from ..models import encode_prompt, load_tokenizer, resolve
from ..plans import choose_bits, parse_bits_or_plan
from ..runtime import generate
from .output import DEVICE_OPTION, JSON_OPTION, show, writing_stdout
from .sizing import BUDGET_OPTION, FIT_OPTION, load_sized


class _Stream(TextStreamer):
    """Text on stdout as it comes."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        with writing_stdout():
            super().on_finalized_text(text, stream_end)


def command(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or hub id, OUT or OUT:BITS.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    bits: Annotated[str | None, typer.Option(help="Precision, or a plan's file; the highest by default.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above 0 samples.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    draft_bits: Annotated[
        int | None, typer.Option(help="Draft tokens at this precision, check them at --bits.")
    ] = None,
    draft_tokens: Annotated[int, typer.Option(help="The most tokens drafted at a time.")] = 4,
    budget: str | None = BUDGET_OPTION,
    fit: bool = FIT_OPTION,
    device: str = DEVICE_OPTION,
    json: bool = JSON_OPTION,
) -> None:
    """Continue PROMPT at the chosen bits, streaming to the terminal."""
    target, chosen = choose_bits(model, None if bits is None else parse_bits_or_plan(bits))
    context = None
    if fit:
        context = len(encode_prompt(load_tokenizer(resolve(target, weights=False)), prompt)) + max_new_tokens
    most = chosen if isinstance(chosen, int) else None
    loaded = load_sized(target, chosen, budget=budget, fit=fit, context=context, device=device, max_bits=most)
    tokenizer = load_tokenizer(resolve(target, weights=False))
    streamer = None if json else _Stream(tokenizer, skip_special_tokens=True)
    result = generate(
        loaded,
        prompt,
        bits=chosen,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        draft_bits=draft_bits,
        draft_tokens=draft_tokens,
        tokenizer=tokenizer,
        streamer=streamer,
    )
    if json:
        show(result, as_json=True)
        return
    speed = "" if result.tokens_per_second is None else f", {result.tokens_per_second:.1f} tokens/s"
    accepted = "" if result.acceptance is None else f", {result.acceptance:.0%} of drafts at {draft_bits} bits accepted"
    precision = f"{result.bits} bits" if isinstance(result.bits, int) else f"plan {result.bits}"
    typer.echo(f"[{precision}, {result.tokens} tokens{speed}{accepted}]", err=True)
