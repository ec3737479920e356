"""Train a small mixture of experts whose routing is real, for measurements of what expert models are about.

    python benchmarks/train_experts.py DENSE OUT [--steps 250] [--experts 8] [--text FILE]

DENSE is a small Llama, such as the demo's model. Its blocks become blocks of a Mixtral with `--experts` experts, two a
token, of half its intermediate size: each expert starts with a random half of the dense layer's units, so that a token
reads about as many weights as before. Everything is then trained on the demo's corpus (the standard library's
calibration part, and `--text` beside it) with a small loss for balance, as published mixtures are, which leaves some
experts hot and some cold. A checkpoint is written every `--save` steps, so an interrupted run is usable.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

from bitstrata.calibration import read_text


def mixture_of(dense: torch.nn.Module, experts: int, balance: float, generator: torch.Generator) -> MixtralForCausalLM:
    """A Mixtral whose experts are random halves of the units of `dense`, a Llama."""
    old = dense.config
    size = old.intermediate_size // 2
    config = MixtralConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        head_dim=old.head_dim,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps,
        rope_parameters=old.rope_parameters,
        tie_word_embeddings=old.tie_word_embeddings,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        num_local_experts=experts,
        num_experts_per_tok=2,
        router_aux_loss_coef=balance,
        output_router_logits=True,
        sliding_window=None,
    )
    model = MixtralForCausalLM(config)
    weights, own = dict(dense.named_parameters()), dict(model.named_parameters())
    with torch.no_grad():
        for name in own.keys() & weights.keys():
            own[name].copy_(weights[name])
        for index, block in enumerate(model.model.layers):
            dense_mlp = dense.model.layers[index].mlp
            merged = block.mlp.experts
            for expert in range(experts):
                units = torch.randperm(old.intermediate_size, generator=generator)[:size]
                merged.gate_up_proj[expert, :size] = dense_mlp.gate_proj.weight[units]
                merged.gate_up_proj[expert, size:] = dense_mlp.up_proj.weight[units]
                merged.down_proj[expert] = 2 * dense_mlp.down_proj.weight[:, units]
    return model


def learning_rate(step: int, steps: int, peak: float, warmup: int = 15) -> float:
    """Linear to `peak` in `warmup` steps, then cosine to a tenth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def windows(stream: Tensor, count: int, seq_len: int, generator: torch.Generator) -> Tensor:
    """Random windows that start with token 0: int64 [count, seq_len]."""
    starts = torch.randint(len(stream) - seq_len, (count,), generator=generator)
    picked = torch.stack([stream[start : start + seq_len] for start in starts.tolist()])
    picked[:, 0] = 0
    return picked


def stream_of(tokenizer: object, documents: list[str]) -> Tensor:
    """All documents, each behind token 0: int64 [tokens]."""
    encode = tokenizer.encode  # type: ignore[attr-defined]
    return torch.cat([torch.tensor([0, *encode(text, add_special_tokens=False)]) for text in documents])


@torch.no_grad()
def heldout_loss(model: MixtralForCausalLM, stream: Tensor, seq_len: int) -> float:
    """Mean next-token loss of 32 fixed windows, nats."""
    ids = windows(stream, 32, seq_len, torch.Generator().manual_seed(0))
    logits = model(input_ids=ids, use_cache=False, output_router_logits=False).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()))


def save(model: MixtralForCausalLM, tokenizer: object, folder: Path) -> None:
    """The model in bf16, as a copy: training goes on in fp32."""
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    model.config.output_router_logits = False
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder, state_dict=halves)
    model.config.output_router_logits = True
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--text", type=Path, action="append", default=[])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--balance", type=float, default=1e-3)
    parser.add_argument("--save", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(arguments.dense)
    dense = AutoModelForCausalLM.from_pretrained(arguments.dense, dtype=torch.float32)
    documents = list(read_text("stdlib", part="calibration"))
    for path in arguments.text:
        documents += path.read_text(encoding="utf-8").split("<|endoftext|>")
    stream = stream_of(tokenizer, documents)
    heldout = stream_of(tokenizer, list(read_text("stdlib", part="heldout")))
    model = mixture_of(dense, arguments.experts, arguments.balance, generator)
    print(f"{len(stream)} tokens; {model.num_parameters() / 1e6:.2f} M parameters", flush=True)
    print(f"held-out loss {heldout_loss(model, heldout, arguments.seq_len):.3f}", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    started = time.monotonic()
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.learning_rate)
        ids = windows(stream, arguments.batch_size, arguments.seq_len, generator)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss  # the loss for balance is in it
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 5 == 0 or step == arguments.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)
        if (step + 1) % arguments.save == 0 or step == arguments.steps - 1:
            save(model, tokenizer, arguments.output)
            print(f"held-out loss {heldout_loss(model, heldout, arguments.seq_len):.3f} nats a token", flush=True)


if __name__ == "__main__":
    main()
