"""The errors that mutate.py plants: each one line, the kind that a tired person makes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """`old`, which occurs once in src/bitstrata/`file`, becomes `new`; `tests` should notice, the first one first."""

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


PLANES = ("tests/planes", "tests/golden")
SOLVERS = ("tests/solvers",)
BITS = ("tests/nn", "tests/models/test_threads_and_bits.py", "tests/models/test_loading.py")
TUNING = "tests/quantization/test_tuning.py"
JOB = ("tests/quantization/test_damaged_parts.py", "tests/quantization/test_resume.py", TUNING)
CHECKPOINT = ("tests/checkpoint",)
ENGINE = ("tests/runtime",)
SERVE = ("tests/serve",)
KERNELS = (
    "tests/kernels/test_blocked.py",
    "tests/kernels/test_decode_tiles.py",
    "tests/kernels/test_instruction_sets.py",
    "tests/kernels/test_int8.py",
    "tests/kernels/test_ops.py",
    "tests/kernels/test_determinism.py",
    "tests/kernels/test_accuracy.py",
    "tests/kernels/test_gradients.py",
    "tests/kernels/test_with_pages.py",
)
CPU = "kernels/cpu/blocked.py"
NATIVE = "kernels/cpu/native"

MUTATIONS = [
    # the format
    Mutation("unpack-shift", "bits of a byte unpacked in the other order", "planes/pack.py",
             "    shifts = torch.arange(8, ", "    shifts = 7 - torch.arange(8, ", PLANES),
    Mutation("decode-order", "scales meet the planes in the other order", "planes/decode.py",
             "scales.scale[index].to", "scales.scale[bits - 1 - index].to", PLANES),
    Mutation("code-order", "plane 0 is the lowest bit of a codebook's code", "planes/decode.py",
             "code = code * 2 + unpack_bits(weight.planes[index]",
             "code = code * 2 + unpack_bits(weight.planes[bits - 1 - index]", PLANES),
    Mutation("last-group", "the last group of columns is skipped", "planes/decode.py",
             "        total += scales.scale[index].to(accumulate).unsqueeze(-1) * plane.view(len(plane), groups, size)",
             "        more = scales.scale[index].to(accumulate).unsqueeze(-1) * plane.view(len(plane), groups, size)\n"
             "        total[:, : max(1, groups - 1)] += more[:, : max(1, groups - 1)]", PLANES),
    # kernels, Python
    Mutation("few-rows", "16 rows go through the decoded weight", CPU,
             "rows <= limit:", "rows < limit:",
             ("tests/kernels/test_instruction_sets.py", *KERNELS)),
    Mutation("table-padding", "padding of packed codebooks is not zero", CPU,
             "room.view(SCALE_DTYPE).zero_()[:", "room.view(SCALE_DTYPE)[:",
             ("tests/kernels/test_blocked.py", *KERNELS)),
    Mutation("second-decoded-tile", "a second tile of the decoded weight is the first one again", CPU,
             "            self._decode(bits, first, last, tile)\n",
             "            self._decode(bits, 0, last - first, tile)\n",
             ("tests/kernels/test_model_widths.py", *KERNELS)),
    Mutation("cut-to-a-byte", "bits of rows are cut to a byte: 258 is 2", "kernels/weight.py",
             "bits.long().clamp(-1, 127).to(torch.int8)", "bits.to(torch.int8)",
             ("tests/kernels/test_ops.py", *KERNELS)),
    Mutation("gradient-rows", "gradients of several tiles are not added up", "kernels/ops.py",
             "y.addmm_(x[:, first:last], tile)", "torch.mm(x[:, first:last], tile, out=y)",
             ("tests/kernels/test_gradients.py", *KERNELS)),
    Mutation("pages-kept", "a weight that shrinks keeps a plane too many", CPU,
             "list(self.planes[:bits])", "list(self.planes[: bits + 1])",
             ("tests/kernels/test_with_pages.py", *KERNELS)),
    Mutation("siblings", "layers that share an input share it although it was changed", "nn/fused.py",
             "return x._version == self._before", "return True", ("tests/nn/test_fused.py",)),
    # kernels, C++
    Mutation("native-scales", "scales packed in the other order", f"{NATIVE}/layout.cpp",
             "i < bits ? scale[i * plane + at]", "i < bits ? scale[(bits - 1 - i) * plane + at]",
             ("tests/kernels/test_blocked.py", *KERNELS)),
    Mutation("native-order", "results of mixed rows written in sorted order", f"{NATIVE}/linear.cpp",
             "size_t(order.rows[r]) * here.rows", "size_t(base + r) * here.rows",
             ("tests/kernels/test_instruction_sets.py", *KERNELS)),
    Mutation("native-steps", "a byte level is worth half a percent too little", f"{NATIVE}/generic/tables.h",
             "S::floats(2 / most)", "S::floats(2 / (most + 1))", ("tests/kernels/test_int8.py", *KERNELS)),
    Mutation("native-activations", "activations are scaled to 128, which a byte does not hold",
             f"{NATIVE}/generic/activations.h",
             "used ? all / 127 : 0", "used ? all / 128 : 0",
             ("tests/kernels/test_instruction_sets.py", *KERNELS)),
    Mutation("native-last-unit", "the last columns are not added up", f"{NATIVE}/generic/few_rows.h",
             "  if (late) finish(layout.units - 1, *tables);",
             "  if (late && layout.units > 2) finish(layout.units - 1, *tables);",
             ("tests/kernels/test_instruction_sets.py", *KERNELS)),
    Mutation("native-row", "a row that is looked up is read from another one's place", f"{NATIVE}/generic/decode.h",
             "kQuads + within % 4) * kWordBytes + within / 4 * 16;",
             "kQuads + within / 4) * kWordBytes + within % 4 * 16;",
             ("tests/nn/test_plane_embedding.py",)),
    Mutation("native-later-planes", "planes 5 to 8 decoded from the wrong bit", f"{NATIVE}/generic/decode.h",
             "(n >> (7 - i) & 1)", "(n >> (i - 4) & 1)", ("tests/kernels/test_decode_tiles.py", *KERNELS)),
    Mutation("native-lost-piece", "an exception in one thread is dropped", f"{NATIVE}/threads.cpp",
             "if (loop.error) std::rethrow_exception(loop.error);", "", ("tests/kernels/test_threads.py",)),
    # solvers
    Mutation("rtn-levels", "a grid of 2^p steps instead of levels", "solvers/rtn.py",
             "levels = 2**top - 1", "levels = 2**top", ("tests/solvers/test_rtn.py", *SOLVERS)),
    Mutation("rtn-rounding", "codes rounded to a step that is not the stored one", "solvers/rtn.py",
             "((high - low) / levels / 2).to(SCALE_DTYPE).float()", "((high - low) / levels / 2)",
             ("tests/solvers/test_rtn.py", *SOLVERS)),
    Mutation("gptq-sign", "errors passed on with the wrong sign", "solvers/gptq.py",
             "errors[column - start], alpha=-1)", "errors[column - start], alpha=1)",
             ("tests/solvers/test_with_moments.py", *SOLVERS)),
    Mutation("gptq-feedback", "errors do not reach the next columns", "solvers/gptq.py",
             "            free[end:] -= factor[:, end - start :].T @ errors\n", "",
             ("tests/solvers/test_with_moments.py", *SOLVERS)),
    Mutation("gptq-group", "with another order of columns the grid of the wrong group", "solvers/gptq.py",
             "group = where[column] // group_size", "group = column // group_size",
             ("tests/solvers/test_with_moments.py", *SOLVERS)),
    Mutation("joint-feedback", "errors of a group passed on with the wrong sign", "solvers/joint.py",
             "y[end:] -= panel[:, end - start :].T @ error", "y[end:] += panel[:, end - start :].T @ error",
             ("tests/solvers/test_joint.py", *SOLVERS)),
    Mutation("joint-secure", "rows that lose by more bits keep them", "solvers/joint.py",
             "worse = own > of_lower", "worse = own < 0", ("tests/solvers/test_joint.py", *SOLVERS)),
    Mutation("joint-polish", "coefficients are kept where they made it worse", "solvers/joint.py",
             "better = change < 0", "better = change > 0", ("tests/solvers/test_joint.py", *SOLVERS)),
    Mutation("target-sign", "the target corrected in the wrong direction", "solvers/metric.py",
             "target[:, rows] += correction", "target[:, rows] -= correction",
             ("tests/solvers/test_moments.py", *SOLVERS)),
    Mutation("zero-has-a-sign", "a residual of 0 has no bit", "solvers/bcq.py",
             "torch.where(x >= 0, 1.0, -1.0)", "torch.sign(x)", ("tests/solvers/test_bcq_steps.py", *SOLVERS)),
    Mutation("bcq-fallback", "groups that rounding made worse stay worse", "solvers/bcq.py",
             "worse = error > old_error\n", "worse = error > old_error + 1e9\n",
             ("tests/solvers/test_bcq.py", *SOLVERS)),
    Mutation("kmeans-border", "a value on a border goes below it", "solvers/kmeans.py",
             "torch.searchsorted(inner, torch.from_numpy(values - points.middle), right=True)",
             "torch.searchsorted(inner, torch.from_numpy(values - points.middle))",
             ("tests/solvers/test_kmeans.py", *SOLVERS)),
    Mutation("training-kept", "training is kept although it made the block worse", "solvers/reconstruct.py",
             "if not after < before:", "if after != after:", ("tests/solvers/test_reconstruct.py", *SOLVERS)),
    Mutation("scale-range", "scales beyond fp16 become infinite", "solvers/grouping.py",
             "return value.clamp(-limit, limit).to(SCALE_DTYPE)", "return value.to(SCALE_DTYPE)",
             ("tests/solvers/test_bcq.py", *SOLVERS)),
    # bits
    Mutation("bits-restored", "bits stay after an exception", "nn/bits.py",
             "        try:\n            yield\n        finally:\n            with uses.lock:\n"
             "                self._become(uses.leave(use))",
             "        yield\n        with uses.lock:\n            self._become(uses.leave(use))",
             ("tests/nn/test_bits_state.py", *BITS)),
    Mutation("other-thread", "a thread may change the bits under another", "nn/uses.py",
             "if other.thread != use.thread and not same:", "if other.thread == use.thread and False:",
             ("tests/nn/test_uses.py", *BITS)),
    Mutation("outer-use", "after an inner block the outer one's bits are gone", "nn/uses.py",
             "return self._open[-1] if self._open else None", "return None", ("tests/nn/test_bits_state.py", *BITS)),
    Mutation("beams", "rows of several beams take each other's bits", "nn/bits.py",
             "rows.repeat_interleave(shape[0] // count)", "rows.repeat(shape[0] // count)",
             ("tests/nn", "tests/models/test_architectures.py")),
    Mutation("resize-waits", "weights are exchanged in the middle of a step", "nn/uses.py",
             "self.lock.wait_for(lambda: not any(use.is_step for use in self._open))",
             "self.lock.wait_for(lambda: True)", ("tests/nn/test_uses.py", "tests/plans/test_resize.py")),
    # the job
    Mutation("damaged-part", "a resumed job trusts a damaged part", "quantization/state.py",
             "if path not in self._sound and not has_right_seal(path):", "if path.suffix == '':", JOB),
    Mutation("other-settings", "a job goes on with other settings", "quantization/state.py",
             "            if changed:\n", "            if len(changed) > 99:\n",
             ("tests/quantization/test_resume.py", *JOB)),
    Mutation("tuning-moments", "a resumed tuning forgets the moments of Adam", "quantization/tuning.py",
             "optimizer.state[layer.change] = moments", "moments.clear()", (TUNING,)),
    Mutation("half-tuned", "tuned scales count before every block has some", "quantization/state.py",
             "self.refined = 0 < solved == sum(1 for _ in self.folder.glob(\"refined-*.safetensors\"))",
             "self.refined = 0 < sum(1 for _ in self.folder.glob(\"refined-*.safetensors\"))",
             (TUNING, "tests/quantization/test_resume.py", "tests/quantization/test_kill.py")),
    # checkpoints and plans
    Mutation("digest", "a damaged file passes", "checkpoint/reader.py",
             "if found != self._digests.get(file):", "if not found:", CHECKPOINT),
    Mutation("shape", "the shape of a tensor is not compared", "checkpoint/reader.py",
             "    if found != expected:\n", "    if found[0] != expected[0]:\n", CHECKPOINT),
    Mutation("not-finite", "NaN in scales passes", "checkpoint/reader.py",
             "    if value.dtype == torch.float16 and not all(", "    if value.dtype == torch.float64 and not all(",
             CHECKPOINT),
    Mutation("config-first", "an interrupted write leaves the old config.json", "checkpoint/writer.py",
             "        (folder / CONFIG_FILE).unlink(missing_ok=True)\n", "",
             ("tests/checkpoint", "tests/quantization/test_output_paths.py", "tests/cli/test_disk_full.py")),
    Mutation("budget", "a budget in bytes forgets what is not in planned layers", "plans/budget.py",
             "limit = int(budget.amount) - self.fixed", "limit = int(budget.amount)",
             ("tests/plans/test_plan_files.py", "tests/allocation", "tests/plans/test_fit.py")),
    Mutation("page-order", "a page that does not fit is passed over", "plans/order.py",
             "                break\n            left -= page.bytes",
             "                continue\n            left -= page.bytes",
             ("tests/plans/test_plan_files.py", "tests/allocation", "tests/plans/test_resize.py")),
    # measuring
    Mutation("shifted-targets", "each token is predicted from the one after it", "evaluation/perplexity.py",
             "logits[:, :-1][predicted[:, 1:]]", "logits[:, 1:][predicted[:, 1:]]", ("tests/evaluation",)),
    Mutation("divergence", "the divergence is taken the other way round", "metrics.py",
             "(log_p.exp() * (log_p - log_q))", "(log_q.exp() * (log_q - log_p))", ("tests/evaluation",)),
    Mutation("cross-terms", "losses of two layers do not add up", "allocation/sensitivity.py",
             "float(products[-1, -1]), 2 * products[-1, :-1]", "float(products[-1, -1]), products[-1, :-1]",
             ("tests/allocation",)),
    Mutation("slide", "the layer that loses most goes down first", "allocation/greedy.py",
             "np.where(size < 0, loss / np.maximum(-size, 1), np.inf).argmin())",
             "np.where(size < 0, loss / np.maximum(-size, 1), -np.inf).argmax())", ("tests/allocation",)),
    # the engine and the server
    Mutation("cancelled", "a cancelled request goes on", "runtime/batching/engine.py",
             "elif drop or item.handle.cancelled:", "elif drop:", ("tests/runtime/test_engine.py", *ENGINE)),
    Mutation("batch-limit", "a batch gets a row more than computes alike", "runtime/batching/packing.py",
             "if rows + item.length > steady:", "if rows + item.length > steady + 1:",
             ("tests/runtime/test_engine_parts.py", *ENGINE)),
    Mutation("top-p", "the token that reaches top_p is left out", "runtime/batching/sampling.py",
             "kept = reached - probability < top_p", "kept = reached < top_p",
             ("tests/runtime/test_engine_sampling.py", *ENGINE)),
    Mutation("moved-cache", "keys and values stay behind when a request moves", "runtime/batching/memory.py",
             "for layer in self._layers:\n            for held", "for layer in ():\n            for held",
             ("tests/runtime/test_engine_admission.py", *ENGINE)),
    Mutation("cached-offset", "the offset of a head in the cache is rounded into its numbers", "kernels/cached.py",
             "offset = -_up(-low)", "offset = _up(low)",
             ("tests/kernels/test_cached.py", "tests/runtime/test_kv_cache_dtype.py")),
    Mutation("cache-leak", "a finished request keeps its place in the cache", "runtime/batching/engine.py",
             "            self._prefixes.keep(item)\n", "",
             ("tests/runtime/test_engine_admission.py", *ENGINE)),
    Mutation("reused-bits", "what other bits wrote is taken up", "runtime/batching/prefixes.py",
             "wrote is choice or wrote == choice", "True", ("tests/runtime/test_prefixes.py", *ENGINE)),
    Mutation("reused-too-far", "a text takes up a token that is another", "runtime/batching/prefixes.py",
             "            return count\n", "            return min(len(tokens), count + 1)\n",
             ("tests/runtime/test_prefixes.py", *ENGINE)),
    Mutation("client-gone", "the work of a client that has gone goes on", "serve/stream.py",
             "        finally:\n            self._end()", "        finally:\n            pass",
             ("tests/serve/test_serve_connections.py", *SERVE)),
    Mutation("api-key", "any key is taken", "serve/guard.py",
             "return hmac.compare_digest(given.strip().encode(), key) and", "return",
             ("tests/serve/test_serve_limits.py", *SERVE)),
]  # fmt: skip
