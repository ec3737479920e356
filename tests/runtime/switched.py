"""What an engine under a policy is compared with."""

from __future__ import annotations

import torch


def switching(model, prompt, bits):
    """Greedy tokens of one request alone, the i-th computed at bits[i]; its cache holds what earlier bits made."""
    tokens, fed, cache = [], torch.tensor([prompt]), None
    for value in bits:
        with torch.no_grad():
            output = model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1, bits=value)
        cache = output.past_key_values
        tokens.append(int(output.logits[0, -1].argmax()))
        fed = torch.tensor([tokens[-1:]])
    return tokens
