"""Chat templates for the tiny tokenizer: with tools, without, and one that refuses a system message."""

from __future__ import annotations

from tiny_models import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ '=' + m['role'] + '=' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '=assistant=' }}{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + PLAIN
TOOLS = (
    "{{ bos_token }}{% for t in tools or [] %}{{ '#' + t['function']['name'] }}{% endfor %}{% for m in messages %}"
    "{{ '=' + m['role'] + '=' }}{% if m['role'] == 'assistant' %}{{ '-' }}{% endif %}{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ '<' + c['function']['name'] }}{{ c['function']['arguments'] | tojson }}"
    "{{ '>' }}{% endfor %}{{ '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '=assistant=' }}{% endif %}"
)


def chat_tokenizer(template: str | None, prefix: str = "<s>") -> PreTrainedTokenizerFast:
    """The tiny tokenizer with this template."""
    tokenizer = tiny_tokenizer(prefix)
    tokenizer.chat_template = template
    return tokenizer
