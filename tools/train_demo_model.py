"""Train a small Llama on the Python standard library's source: a model like the bundled pycode-5m.

    python tools/train_demo_model.py OUT [--steps 2400] [--hidden-size 256] [--layers 6] ...

Byte-pair vocabulary, windows of `--seq-len` tokens that start with the end-of-text token, AdamW with
a cosine schedule after a short warm-up, bf16 weights on disk. The bundled model was trained with
these settings on 200 MB of Python source, the standard library among it; with the standard library
alone (about 10 MB) the model is of the same kind but knows less. Modules of the "heldout" part of
`bitstrata.calibrate.read_text("stdlib")` are kept out and give the loss printed at the end.

On two CPU cores the full run takes some hours; `--steps 50` shows that it works.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bitstrata.calibration import read_text
from bitstrata.calibration.data import SEPARATOR


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE; token 0 separates documents and is BOS, EOS and padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=[SEPARATOR], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(documents, trainer)
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), SEPARATOR)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """All documents, each behind token 0: int64 [tokens]."""
    pieces = (torch.tensor([0, *tokenizer.encode(text, add_special_tokens=False)]) for text in documents)
    return torch.cat(list(pieces))


def windows(stream: torch.Tensor, count: int, seq_len: int, generator: torch.Generator) -> torch.Tensor:
    """Random windows with token 0 first: int64 [count, seq_len]."""
    starts = torch.randint(len(stream) - seq_len, (count,), generator=generator)
    picked = torch.stack([stream[start : start + seq_len] for start in starts.tolist()])
    picked[:, 0] = 0
    return picked


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss, nats."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear to `peak` in `warmup` steps, then cosine to a tenth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-value-heads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists; choose another folder")

    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    documents = read_text("stdlib", part="calibration")
    tokenizer = train_tokenizer(documents, arguments.vocabulary)
    stream = token_stream(tokenizer, documents)
    print(f"{len(documents)} modules, {len(stream)} tokens, vocabulary {len(tokenizer)}")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.key_value_heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    started = time.monotonic()
    for step in range(arguments.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, arguments.steps, arguments.learning_rate)
        loss = loss_of(model, windows(stream, arguments.batch_size, arguments.seq_len, generator))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0 or step == arguments.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)

    model.eval()
    heldout = token_stream(tokenizer, read_text("stdlib", part="heldout"))
    with torch.no_grad():
        losses = [loss_of(model, windows(heldout, 8, arguments.seq_len, generator)).item() for _ in range(8)]
    print(f"held-out loss {sum(losses) / len(losses):.3f} nats a token")
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
