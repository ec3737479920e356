"""OpenAI's own client against a running server."""

from __future__ import annotations

import math

import openai
import pytest
from http_calls import WAIT

PROMPT = "def area(width, height):\n    return"


def counted(usage):
    """All but what was computed before."""
    return usage.model_dump(exclude={"prompt_tokens_details"})


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=WAIT) as made:
        yield made


@pytest.fixture(scope="module")
def chat_client(chat_server):
    with openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="-", max_retries=0, timeout=WAIT) as made:
        yield made


def complete(client, **settings):
    return client.completions.create(**{"model": "small", "prompt": PROMPT, "temperature": 0, **settings})


def chat(client, *turns, **settings):
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]
    return client.chat.completions.create(
        **{"model": "small", "messages": messages, "temperature": 0, "max_tokens": 12, **settings}
    )


def test_what_was_in_the_cache_is_counted(client, tokenizer):
    prompt = "def counted(first, second):\n" + 3 * "    third = first + 17 * second - 12\n" + "    return "
    length = len(tokenizer(prompt).input_ids)
    assert length > 40
    fresh, again = (complete(client, prompt=prompt, max_tokens=4, model="small:3") for _ in range(2))
    assert fresh.usage.prompt_tokens_details.cached_tokens == 0
    assert length - 17 <= again.usage.prompt_tokens_details.cached_tokens < length == again.usage.prompt_tokens
    assert again.choices[0].text == fresh.choices[0].text
    many = complete(client, prompt=[prompt, "x"], max_tokens=4, n=3, model="small:3")
    assert many.usage.prompt_tokens_details == again.usage.prompt_tokens_details
    other = complete(client, prompt=prompt, max_tokens=4, model="small:2")
    assert other.usage.prompt_tokens_details.cached_tokens == 0


def test_models_are_listed_under_each_precision(client):
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["small", "small:2", "small:3", "small:4"]
    assert models["small"].bits == 4
    sizes = [models[f"small:{bits}"].bytes_per_token for bits in (2, 3, 4)]
    assert 0 < sizes[0] < sizes[1] < sizes[2]
    one = client.models.retrieve("small:3")
    assert (one.id, one.bits, one.bytes_per_token, one.max_model_len) == ("small:3", 3, sizes[1], 1024)
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("small:5")


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_completion_is_what_the_model_generates_at_these_bits(client, tokenizer, alone, bits):
    tokens = alone(PROMPT, bits, 24)
    by_name = complete(client, model=f"small:{bits}", max_tokens=24, extra_body={"return_token_ids": True})
    by_field = complete(client, max_tokens=24, extra_body={"bits": bits})
    assert by_name.choices[0].token_ids == tokens
    assert by_name.choices[0].text == by_field.choices[0].text == tokenizer.decode(tokens, skip_special_tokens=True)
    assert by_name.bits == by_field.bits == bits
    assert by_name.usage.completion_tokens == len(tokens)
    assert by_name.usage.prompt_tokens == len(tokenizer(PROMPT).input_ids)
    assert by_name.usage.total_tokens == by_name.usage.prompt_tokens + len(tokens)
    assert by_name.usage.bits == {str(bits): len(tokens)}
    assert by_name.model == f"small:{bits}"


def test_a_stream_is_the_whole_in_pieces(client):
    whole = complete(client, max_tokens=20, logprobs=1)
    chunks = list(complete(client, max_tokens=20, logprobs=1, stream=True, stream_options={"include_usage": True}))
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    *parts, last = chunks
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    shown = [value for part in parts for value in part.choices[0].logprobs.token_logprobs]
    assert shown == whole.choices[0].logprobs.token_logprobs
    assert [part.choices[0].finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert {part.bits for part in chunks} == {4}
    assert last.choices == []
    assert counted(last.usage) == counted(whole.usage)
    without = list(complete(client, max_tokens=5, stream=True))
    assert all(chunk.usage is None for chunk in without)


def test_several_prompts_and_several_replies_keep_their_order(client, alone, tokenizer):
    prompts = ["import os\n", "class Node:\n", "for i in"]
    reply = complete(client, prompt=prompts, n=2, max_tokens=8)
    assert [choice.index for choice in reply.choices] == list(range(6))
    for index, choice in enumerate(reply.choices):
        assert choice.text == tokenizer.decode(alone(prompts[index // 2], 4, 8), skip_special_tokens=True)
    texts = [""] * 6
    for chunk in complete(client, prompt=prompts, n=2, max_tokens=8, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in reply.choices]
    prompt_tokens = sum(len(tokenizer(prompt).input_ids) for prompt in prompts)
    assert reply.usage.prompt_tokens == prompt_tokens
    assert reply.usage.completion_tokens == 6 * 8


def test_prompts_as_tokens(client, tokenizer):
    ids = tokenizer(PROMPT).input_ids
    expected = complete(client, max_tokens=8).choices[0].text
    one = complete(client, prompt=ids, max_tokens=8)
    several = complete(client, prompt=[ids] * 2, max_tokens=8)
    assert [choice.text for choice in (*one.choices, *several.choices)] == [expected] * 3


def test_a_chat_goes_through_the_template(chat_client, alone, tokenizer):
    reply = chat(chat_client, "add two numbers", "how?", "in Python")
    text = "# user: add two numbers\n# assistant: how?\n# user: in Python\n# reply:"
    ids = tokenizer.encode(text, add_special_tokens=False)
    by_tokens = complete(chat_client, prompt=ids, max_tokens=12)
    message = reply.choices[0].message
    assert (message.role, message.content) == ("assistant", by_tokens.choices[0].text)
    assert reply.usage.prompt_tokens == len(ids)
    assert reply.object == "chat.completion"
    parts = [{"type": "text", "text": "in "}, {"type": "text", "text": "Python"}]
    assert chat(chat_client, "add two numbers", "how?", parts).choices[0].message == message


def test_a_chat_without_a_template_continues_the_text(client):
    reply = chat(client, "def area(width, ", "height", "):\n    return", max_tokens=16)
    assert reply.choices[0].message.content == complete(client, max_tokens=16).choices[0].text
    with pytest.raises(openai.BadRequestError, match="needs a chat template"):
        client.chat.completions.create(model="small", messages=[{"role": "system", "content": "be brief"}])


def test_a_streamed_chat_is_the_whole_in_pieces(chat_client):
    whole = chat(chat_client, "write a loop", logprobs=True, top_logprobs=2, extra_body={"bits": 3})
    stream = chat(
        chat_client,
        "write a loop",
        logprobs=True,
        top_logprobs=2,
        stream=True,
        stream_options={"include_usage": True},
        model="small:3",
    )
    first, *parts, last = list(stream)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    shown = [entry for part in parts if part.choices[0].logprobs for entry in part.choices[0].logprobs.content]
    assert shown == whole.choices[0].logprobs.content
    assert parts[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert counted(last.usage) == counted(whole.usage)
    assert whole.bits == 3
    assert {part.bits for part in parts} == {3}


def test_log_probabilities_say_how_likely_each_token_was(chat_client):
    reply = chat(chat_client, "write a loop", logprobs=True, top_logprobs=3)
    choice = reply.choices[0]
    assert len(choice.logprobs.content) == reply.usage.completion_tokens
    for entry in choice.logprobs.content:  # greedy: the token is the likeliest one
        assert entry.logprob <= 0
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob)
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.0001
    assert b"".join(bytes(entry.bytes) for entry in choice.logprobs.content).decode() == choice.message.content
    plain = chat(chat_client, "write a loop", logprobs=True).choices[0]
    assert all(entry.top_logprobs == [] for entry in plain.logprobs.content)
    assert chat(chat_client, "write a loop").choices[0].logprobs is None


def test_offsets_of_a_completion_point_at_its_tokens(client):
    choice = complete(client, max_tokens=16, logprobs=2).choices[0]
    shown = choice.logprobs
    for token, offset in zip(shown.tokens, shown.text_offset, strict=True):
        assert choice.text[offset:].startswith(token)
    for token, logprob, top in zip(shown.tokens, shown.token_logprobs, shown.top_logprobs, strict=True):
        assert top[token] == pytest.approx(logprob)
        assert len(top) == 2
    zero = complete(client, max_tokens=4, logprobs=0).choices[0].logprobs
    assert len(zero.tokens) == 4
    assert zero.top_logprobs is None


def test_a_seed_repeats_a_sampled_reply_and_different_ones_differ(client):
    def text(seed):
        return complete(client, temperature=1.0, seed=seed, max_tokens=24).choices[0].text

    assert text(7) == text(7)
    assert len({text(seed) for seed in range(4)}) > 1
    replies = complete(client, temperature=1.0, seed=7, n=3, max_tokens=24).choices
    assert len({choice.text for choice in replies}) > 1
    assert replies[0].text == text(7)


def test_top_p_and_temperature_reach_the_sampler(client):
    greedy = complete(client, max_tokens=16).choices[0].text
    assert complete(client, temperature=1.0, top_p=1e-9, max_tokens=16).choices[0].text == greedy
    assert complete(client, temperature=1e-60, max_tokens=16).choices[0].text == greedy


def test_a_reply_ends_before_its_stop_text(client, alone, tokenizer):
    whole = complete(client, max_tokens=40).choices[0].text
    stop = whole[7:12]  # spans tokens
    expected = whole[: whole.index(stop)]
    for stops in (stop, ["never to be seen", stop]):
        reply = complete(client, max_tokens=40, stop=stops)
        assert reply.choices[0].text == expected
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage.completion_tokens < 40
    chunks = list(complete(client, max_tokens=40, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "stop"
    held = complete(client, max_tokens=3, stop=complete(client, max_tokens=3).choices[0].text + "?")
    assert held.choices[0].text == complete(client, max_tokens=3).choices[0].text
    assert held.choices[0].finish_reason == "length"


def test_limits_on_new_tokens(client, chat_client):
    assert complete(client).usage.completion_tokens <= 16
    assert chat(chat_client, "x", max_tokens=openai.omit, max_completion_tokens=3).usage.completion_tokens == 3
    long = chat(chat_client, "x", max_tokens=openai.omit, extra_body={"ignore_eos": True})
    assert long.usage.completion_tokens == 512
    with pytest.raises(openai.BadRequestError, match="max_tokens and max_completion_tokens differ"):
        chat(chat_client, "x", max_tokens=2, max_completion_tokens=3)


def test_errors_are_those_that_the_client_knows(client):
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'") as unknown:
        complete(client, model="gpt-4")
    assert unknown.value.code == "model_not_found"
    for settings in ({"model": "small:7"}, {"extra_body": {"bits": 7}}, {"extra_body": {"min_bits": 7}}):
        with pytest.raises(openai.BadRequestError, match="supported bits: 2, 3, 4") as unsupported:
            complete(client, **settings)
        assert unsupported.value.code == "unsupported_bits"
    with pytest.raises(openai.BadRequestError, match="give one of them"):
        complete(client, model="small:3", extra_body={"bits": 4})
    with pytest.raises(openai.BadRequestError, match="min_bits=3 is above bits=2"):
        complete(client, model="small:2", extra_body={"min_bits": 3})
    with pytest.raises(openai.BadRequestError, match="leaves no room") as long:
        complete(client, prompt="x y " * 3000)
    assert long.value.code == "context_length_exceeded"
    assert complete(client, model="small:3", extra_body={"bits": 3, "min_bits": 2}, max_tokens=2).bits == 3


def test_a_refusal_by_the_template_is_said_in_its_words(chat_client):
    with pytest.raises(openai.BadRequestError, match="the system speaks first"):
        chat_client.chat.completions.create(
            model="small", messages=[{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]
        )
    reply = chat_client.chat.completions.create(
        model="small", messages=[{"role": "developer", "content": "be brief"}], max_tokens=2
    )
    assert reply.usage.completion_tokens == 2
