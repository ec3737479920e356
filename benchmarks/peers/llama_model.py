"""llama.cpp with a Llama of any shape: a GGUF file of random weights, and decoding through its low-level functions.

What a product costs does not depend on the values, so a matrix's rows are drawn from a few quantized ones: a billion
weights would take minutes to quantize. As llama.cpp's own files do, embeddings and output are Q6_K.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from bitstrata.errors import CheckError, ResourceError

from . import ggml_library
from .batches import prompts

HEAD = "Q6_K"
DISTINCT_ROWS = 256
SPREAD = 0.02  # of the weights, as in the models of bench.random_model


def write_gguf(path: Path, config: PreTrainedConfig, kind: str, seed: int) -> int:
    """Write a model of `config`'s shape with its matrices in `kind`; returns the bytes that one token reads."""
    import gguf

    generator = np.random.default_rng(seed)
    rows_of: dict[tuple[str, int], np.ndarray] = {}

    def matrix(rows: int, columns: int, of: str) -> np.ndarray:
        if (of, columns) not in rows_of:
            dense = generator.standard_normal((DISTINCT_ROWS, columns), np.float32) * SPREAD
            rows_of[of, columns] = ggml_library.quantize(dense, of)
        return rows_of[of, columns][generator.integers(0, DISTINCT_ROWS, rows)]

    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, shared = config.num_attention_heads * head, config.num_key_value_heads * head
    block = {
        "attn_q": (queries, hidden),
        "attn_k": (shared, hidden),
        "attn_v": (shared, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    writer = gguf.GGUFWriter(path, "llama")
    _describe(writer, config)
    read = 0

    def add(name: str, values: np.ndarray, of: str) -> int:
        raw = None if of == "F32" else gguf.GGMLQuantizationType[of]
        writer.add_tensor(f"{name}.weight", values, raw_dtype=raw)
        return values.nbytes

    embedding = add("token_embd", matrix(config.vocab_size, hidden, HEAD), HEAD)
    if config.tie_word_embeddings:  # the output is the embedding, read as a whole
        read += embedding
    else:
        read += add("output", matrix(config.vocab_size, hidden, HEAD), HEAD)
    ones = np.ones(hidden, np.float32)
    read += add("output_norm", ones, "F32")
    for index in range(config.num_hidden_layers):
        for name, (rows, columns) in block.items():
            read += add(f"blk.{index}.{name}", matrix(rows, columns, kind), kind)
        for norm in ("attn_norm", "ffn_norm"):
            read += add(f"blk.{index}.{norm}", ones, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


def _describe(writer: Any, config: PreTrainedConfig) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")  # token ids go in and come out


def _loaded(library: Any, path: Path) -> Any:
    """llama.cpp's model in the file `path`. Raises ResourceError if it cannot be had."""
    library.llama_log_set(ggml_library.silent_log(), ctypes.c_void_p(0))
    library.llama_backend_init()
    model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    if not model:
        raise ResourceError(f"llama.cpp cannot load {path}", hint="is there enough memory?")
    return model


class LlamaDecoder:
    """A sequence being continued greedily by llama.cpp, one token a step, after `context` tokens."""

    def __init__(
        self, path: Path, *, vocabulary: int, context: int, most_tokens: int, threads: int, prompt: int = 0
    ) -> None:
        import llama_cpp

        self._library, self._vocabulary = llama_cpp, vocabulary
        self._model = _loaded(llama_cpp, path)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch = most_tokens, max(context, prompt)
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise ResourceError(f"llama.cpp cannot make a context of {most_tokens} tokens")
        self._token = self._run([index % vocabulary for index in range(context)])

    def step(self) -> None:
        self._token = self._run([self._token])

    def prompt(self, tokens: int) -> None:
        """A prompt of so many tokens, in the place of the sequence."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._run([index % self._vocabulary for index in range(tokens)])

    def _run(self, tokens: list[int]) -> int:
        ids = (self._library.llama_token * len(tokens))(*tokens)
        status = self._library.llama_decode(self._context, self._library.llama_batch_get_one(ids, len(tokens)))
        if status != 0:
            raise CheckError(f"llama_decode ended with status {status}")
        self.logits = np.ctypeslib.as_array(
            self._library.llama_get_logits_ith(self._context, -1), shape=(self._vocabulary,)
        )
        return int(self.logits.argmax())

    def close(self) -> None:
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)


class LlamaBatch:
    """Up to `most` sequences at once in llama.cpp, each in a cache of its own, continued greedily."""

    def __init__(
        self, path: Path, *, name: str, bits: int, vocabulary: int, most: int, context: int, tokens: int, threads: int
    ) -> None:
        import llama_cpp

        self.name, self.bits, self._library, self._vocabulary = name, bits, llama_cpp, vocabulary
        self._model = _loaded(llama_cpp, path)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.n_batch = most * (context + tokens + 1), most, most * context
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise ResourceError(f"llama.cpp cannot make a context of {most} sequences")
        self._batch = llama_cpp.llama_batch_init(most * context, 0, 1)

    def run(self, count: int, context: int, tokens: int) -> float:
        """As peers.batches.Batch."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        made = self._run(prompts(count, context, self._vocabulary), 0)
        started = time.perf_counter()
        for step in range(tokens):
            made = self._run([[token] for token in made], context + step)
        return count * tokens / (time.perf_counter() - started)

    def _run(self, tokens: list[list[int]], past: int) -> list[int]:
        """The likeliest token after each sequence's next tokens, of which there are equally many."""
        batch, at, ends = self._batch, 0, []
        for index, sequence in enumerate(tokens):
            for place, token in enumerate(sequence):
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, past + place, 1
                batch.seq_id[at][0], batch.logits[at] = index, place == len(sequence) - 1
                at += 1
            ends.append(at - 1)
        batch.n_tokens = at
        status = self._library.llama_decode(self._context, batch)
        if status != 0:
            raise CheckError(f"llama_decode ended with status {status}")
        rows = [self._library.llama_get_logits_ith(self._context, end) for end in ends]
        return [int(np.ctypeslib.as_array(row, shape=(self._vocabulary,)).argmax()) for row in rows]

    def close(self) -> None:
        self._library.llama_batch_free(self._batch)
        self._library.llama_free(self._context)
        self._library.llama_model_free(self._model)
