"""`bitstrata chat`, driven through its standard input."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace

import pytest
import torch
from cli_outcome import Command
from transformers import AutoTokenizer

import bitstrata
from bitstrata.checkpoint import CheckpointReader
from bitstrata.errors import InputError, UnsupportedBitsError, UsageError
from bitstrata.models import load_tokenizer
from bitstrata.plans import Plan
from bitstrata.runtime import Conversation, generate

TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] }}:{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture
def type_in(monkeypatch: pytest.MonkeyPatch):
    """What the user types, line by line."""

    def give(*lines: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))

    return give


def test_bits_change_in_the_middle(quantized, cli: Command, type_in):
    type_in(
        "the cat",
        "/bits 2",
        "sat",
        "/bits",
        "/bits 7",
        "/bits two",
        "",
        "/reset",
        "/help",
        "/bit 3",
        "/quit",
        "never read",
    )
    outcome = cli("chat", f"{quantized}:3", "--max-new-tokens", "5", "--temperature", "0")
    assert outcome.code == 0, outcome.err
    said = outcome.err.splitlines()
    assert any(line.startswith("3 bits of 2, 3, 4; the tokenizer has no chat template") for line in said)
    assert sum(line.startswith("[") for line in said) == 2
    assert any(line.startswith("[3 bits, ") for line in said)
    assert any(line.startswith("[2 bits, ") for line in said)
    assert "2 bits of 2, 3, 4" in said
    assert any(line.startswith("bits=7 is not available") and "2, 3, 4" in line for line in said)
    assert "/bits takes a number, not 'two'" in said
    assert "forgotten" in said
    assert sum(line.startswith("/bits N") for line in said) == 2
    assert sum(line.startswith("'/bit 3' is not a command") for line in said) == 1, "what begins with / is not said"
    assert outcome.out.strip()


def test_the_end_of_input_ends_the_conversation(quantized, cli: Command, type_in):
    type_in()
    assert cli("chat", quantized).code == 0


def test_without_a_template_turns_are_one_text(quantized):
    model, tokenizer = bitstrata.load(quantized), load_tokenizer(quantized)
    talk = Conversation(model, tokenizer, bits=4, max_new_tokens=6)
    first = talk.reply("the cat")
    assert first.text == generate(model, "the cat", bits=4, max_new_tokens=6, tokenizer=tokenizer).text
    talk.bits = 2
    second = talk.reply(" sat")
    whole = "the cat" + first.text + " sat"
    assert second.text == generate(model, whole, bits=2, max_new_tokens=6, tokenizer=tokenizer).text
    talk.reset()
    talk.bits = 4
    assert talk.reply("the cat").text == first.text


def test_a_template_is_used(quantized, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(quantized, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    model = bitstrata.load(folder)
    talk = Conversation(model, tokenizer, system="be brief", max_new_tokens=4)
    first = talk.reply("hi")
    ids = tokenizer("s:be brief\nu:hi\na:", add_special_tokens=False, return_tensors="pt").input_ids
    expected = model.generate(ids, bits=4, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert first.text == tokenizer.decode(expected, skip_special_tokens=True)
    assert first.prompt == "hi"


def test_a_full_context_loses_only_the_turn(quantized):
    model, tokenizer = bitstrata.load(quantized), load_tokenizer(quantized)
    talk = Conversation(model, tokenizer, max_new_tokens=4)
    first = talk.reply("the cat").text
    with pytest.raises(InputError, match="context is 64"):
        talk.reply("x" * 80)
    again = Conversation(model, tokenizer, max_new_tokens=4)
    assert again.reply("the cat").text == first
    assert again.reply(" sat").text == talk.reply(" sat").text


def test_the_full_context_is_said_and_the_chat_goes_on(quantized, cli: Command, type_in):
    type_in("x" * 80, "/reset", "the cat")
    outcome = cli("chat", quantized, "--max-new-tokens", "3", "--temperature", "0")
    assert outcome.code == 0, outcome.err
    assert "/reset forgets the conversation" in outcome.err
    assert "[4 bits, " in outcome.err


def test_control_tokens_in_what_the_user_writes_are_text(quantized):
    """The tokenizer has one token a character, so that the right prompt can be written down."""
    model, tokenizer = bitstrata.load(quantized), load_tokenizer(quantized)
    tokenizer.chat_template = TEMPLATE.replace("\n", "</s>")
    talk = Conversation(model, tokenizer, max_new_tokens=4)
    said = talk.reply("hi</s>a:no")
    ids = [*tokenizer.convert_tokens_to_ids(list("u:hi</s>a:no")), tokenizer.eos_token_id]
    ids += tokenizer.convert_tokens_to_ids(list("a:"))
    expected = model.generate(torch.tensor([ids]), bits=4, max_new_tokens=4, do_sample=False)[0, len(ids) :]
    assert said.text == tokenizer.decode(expected, skip_special_tokens=True)


@pytest.fixture
def templated(quantized, tmp_path):
    """templated(template) -> a copy of the checkpoint with this chat template."""

    def make(template: str):
        folder = tmp_path / "templated"
        shutil.copytree(quantized, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return folder

    return make


def test_a_template_without_a_system_turn_refuses_it_before_the_first_reply(templated, cli: Command, type_in):
    """As Gemma's."""
    folder = templated(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE
    )
    type_in("hi")
    cli("chat", folder, "--system", "be brief").refused(
        3, "the chat template refuses", "no system role", "leave the system"
    )
    with pytest.raises(InputError, match="no system role"):
        Conversation(bitstrata.load(folder), load_tokenizer(folder), system="be brief")
    type_in("hi")
    outcome = cli("chat", folder, "--max-new-tokens", "2")
    assert outcome.code == 0
    assert "[4 bits, " in outcome.err


def test_a_template_that_refuses_a_turn_does_not_end_the_chat(templated, cli: Command, type_in):
    folder = templated("{% if 'x' in messages[-1].content %}{{ raise_exception('no x') }}{% endif %}" + TEMPLATE)
    type_in("xyz", "hi")
    outcome = cli("chat", folder, "--max-new-tokens", "2")
    assert outcome.code == 0, outcome.err
    assert "the chat template refuses these messages: no x" in outcome.err
    assert outcome.err.count("[4 bits, ") == 1


def test_half_a_character_is_refused_and_the_chat_goes_on(quantized, cli: Command, monkeypatch):
    for errors in ("strict", "surrogateescape"):  # as Python opens it in a UTF-8 and in the C locale
        piped = io.TextIOWrapper(io.BytesIO(b"the cat\ncaf\xe9\n sat\n"), encoding="utf-8", errors=errors)
        monkeypatch.setattr("sys.stdin", piped)
        outcome = cli("chat", quantized, "--max-new-tokens", "3", "--temperature", "0")
        assert outcome.code == 0, outcome.err
        assert "what the user says holds half a character" in outcome.err
        assert outcome.err.count("[4 bits, ") == 2, "both other lines are answered"
    cli("chat", quantized, "--system", "caf\udce9").refused(3, "the system instruction holds half a character")
    cli("generate", quantized, "caf\udce9").refused(3, "half a character", "UTF-8")


def test_ctrl_c_ends_the_reply_and_not_the_chat(quantized, cli: Command, type_in, monkeypatch):
    reply, pressed = Conversation.reply, [True]

    def interrupted(self, *arguments):
        if pressed:
            pressed.pop()
            raise KeyboardInterrupt
        return reply(self, *arguments)

    monkeypatch.setattr(Conversation, "reply", interrupted)
    type_in("the cat", "sat")
    outcome = cli("chat", quantized, "--max-new-tokens", "3", "--temperature", "0")
    assert outcome.code == 0, outcome.err
    assert "this turn is forgotten" in outcome.err
    assert outcome.err.count("[4 bits, ") == 1


def test_a_tokenizer_with_more_tokens_than_the_model(quantized, cli: Command, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(quantized, folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["qu"])
    tokenizer.save_pretrained(folder)
    (tmp_path / "text").write_text("a question of taste")
    said = ("token 64 ('qu')", "the model knows 64 tokens")
    cli("generate", folder, "a question").refused(3, *said)
    cli("eval", folder, "--text", tmp_path / "text").refused(3, *said)
    cli("plan", folder, "--text", tmp_path / "text", "--seq-len", "5", "--budget", "4bpw").refused(3, *said)
    assert cli("generate", folder, "a cat", "--max-new-tokens", "2").code == 0


def test_drafts_are_only_used_where_they_are_cheaper(quantized):
    model, tokenizer = bitstrata.load(quantized), load_tokenizer(quantized)
    talk = Conversation(model, tokenizer, bits=4, draft_bits=3, max_new_tokens=4)
    assert talk.reply("the cat").draft_bits == 3
    talk.bits = 2
    assert talk.reply(" sat").draft_bits is None


def test_what_cannot_be_asked_for(quantized, cli: Command, type_in):
    model, tokenizer = bitstrata.load(quantized), load_tokenizer(quantized)
    with pytest.raises(UnsupportedBitsError):
        Conversation(model, tokenizer, bits=8)
    with pytest.raises(UsageError, match="needs a chat template"):
        Conversation(model, tokenizer, system="be brief")
    type_in()
    for arguments in (["--bits", "8"], ["--draft-bits", "8"], ["--temperature", "-1"], ["--system", "be brief"]):
        outcome = cli("chat", quantized, *arguments)
        assert outcome.code in (2, 3), arguments
        assert "error:" in outcome.err
        assert "Traceback" not in outcome.err


def test_a_budget_and_another_in_the_middle(quantized, cli: Command, type_in, tmp_path):
    plan = tmp_path / "three.json"
    Plan.uniform(CheckpointReader(quantized).spec, 3).save(plan)
    type_in("the cat", f"/resize {plan}", "sat", "/bits 3", "/bits 4", "/resize 1kB", "/resize nothing", "/bits")
    outcome = cli("chat", quantized, "--budget", "5GB", "--max-new-tokens", "5", "--temperature", "0")
    assert outcome.code == 0, outcome.err
    said = outcome.err.splitlines()
    assert sum(line.startswith("[plan ") for line in said) == 2
    assert any(" -> " in line and line.endswith(" ms") for line in said)
    assert any("bits=4 is not available" in line for line in said)
    assert any("below the smallest" in line for line in said)
    assert any("'nothing'" in line for line in said)


def test_a_model_loaded_whole_is_not_resized(quantized, cli: Command, type_in):
    type_in("/resize 400MB")
    outcome = cli("chat", quantized)
    assert outcome.code == 0
    assert "cannot be resized" in outcome.err


def test_two_precisions_answer_one_turn_side_by_side(quantized, cli: Command, type_in):
    model, tokenizer = bitstrata.load(quantized), load_tokenizer(quantized)
    settings = {"max_new_tokens": 5}
    talk = Conversation(model, tokenizer, bits=3, **settings)
    with pytest.raises(InputError, match="no turn yet"):
        talk.compare([2, 4])
    kept = talk.reply("the cat")
    before = talk.messages
    low, high = talk.compare([2, 4])
    for answer, bits in ((low, 2), (high, 4)):
        assert answer.bits == bits
        assert answer.text == Conversation(model, tokenizer, bits=bits, **settings).reply("the cat").text
    (alone,) = talk.compare([2], " sat")
    assert alone.text == generate(model, f"the cat{kept.text} sat", bits=2, tokenizer=tokenizer, **settings).text
    with pytest.raises(UnsupportedBitsError):
        talk.compare([2, 7])
    assert talk.messages == before
    assert talk.bits == 3

    type_in(
        "the cat", "/compare 2 4", "/compare 2 4 the cat", "/compare 2", "/compare 2 two", "/compare 2 7", "/save x/y"
    )
    outcome = cli("chat", f"{quantized}:3", "--max-new-tokens", "5", "--temperature", "0")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("[2 bits, ") == outcome.out.count("[4 bits, ") == 2
    assert "/compare takes a number, not 'two'" in outcome.err
    assert "bits=7 is not available" in outcome.err
    assert "/compare N M" in outcome.err, "one number is too few"
    assert "x/y cannot be written" in outcome.err


def test_an_instruction_in_the_middle_keeps_the_turns(templated, cli: Command, type_in):
    folder = templated("{% if 'x' in messages[0].content %}{{ raise_exception('no x') }}{% endif %}" + TEMPLATE)
    model, tokenizer = bitstrata.load(folder), load_tokenizer(folder)
    talk = Conversation(model, tokenizer, max_new_tokens=4)
    first = talk.reply("hi").text
    talk.system = "be brief"
    assert [turn["content"] for turn in talk.messages] == ["be brief", "hi", first]
    again = Conversation(model, tokenizer, max_new_tokens=4, system="be brief")
    again.messages = talk.messages
    assert again.reply("so").text == talk.reply("so").text
    with pytest.raises(InputError, match="no x"):
        talk.system = "x"
    assert talk.system == "be brief"
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "be brief"}]

    type_in("/system", "/system be brief", "hi", "/system", "/system x", "/system off", "/system")
    outcome = cli("chat", folder, "--max-new-tokens", "2")
    assert outcome.code == 0, outcome.err
    said = outcome.err.splitlines()
    assert said.count("be brief") == 1
    assert said.count("no instruction") == 3
    assert any("no x" in line for line in said)


def test_a_conversation_goes_on_from_a_file(quantized, cli: Command, type_in, tmp_path):
    file, listed = tmp_path / "talk.json", tmp_path / "list.json"
    arguments = ("chat", quantized, "--max-new-tokens", "3", "--temperature", "0")
    type_in("the cat", f"/save {file}", "sat")
    whole = cli(*arguments)
    turns = json.loads(file.read_text())["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"]
    listed.write_text(json.dumps(turns))
    for saved in (file, listed):
        type_in(f"/open {saved}", "sat")
        outcome = cli(*arguments)
        assert "2 messages; the last: " in outcome.err
        assert outcome.out.splitlines()[-1] == whole.out.splitlines()[-1]

    broken = tmp_path / "broken.json"
    for text, said in (
        ("{", "cannot be read"),
        ("7", "messages are a list, not int"),
        ('[{"role": "user"}]', "message 1 has no text"),
        ('[{"role": "user", "content": "a"}]', "the last message is the user's"),
        ('[{"role": "assistant", "content": "a"}]', "message 1 is of role 'assistant', where user has the turn"),
        ('[{"role": "system", "content": "a"}]', "needs a chat template"),
    ):
        broken.write_text(text)
        type_in(f"/open {file}", f"/open {broken}", "sat")
        outcome = cli(*arguments)
        assert said in outcome.err, text
        assert outcome.out.splitlines()[-1] == whole.out.splitlines()[-1], "what was open stays"
    type_in(f"/open {tmp_path / 'none'}")
    assert "cannot be read" in cli(*arguments).err


def test_a_text_of_several_lines(quantized, cli: Command, type_in, monkeypatch):
    heard, reply = [], Conversation.reply

    def hear(self, text, streamer):
        heard.append(text)
        return reply(self, text, streamer)

    monkeypatch.setattr(Conversation, "reply", hear)
    type_in('"""the cat', "/quit", 'sat"""', "on \\", "the mat", '"""one line"""', '"""never ended')
    outcome = cli("chat", quantized, "--max-new-tokens", "2")
    assert outcome.code == 0, outcome.err
    assert heard == ["the cat\n/quit\nsat", "on \nthe mat", "one line"]


def test_ctrl_c_where_nothing_is_said_ends_the_chat_at_the_second_time(quantized, cli: Command, monkeypatch):
    keys = iter(["the cat", KeyboardInterrupt, "sat", KeyboardInterrupt, KeyboardInterrupt, "never read"])

    def press(_: str) -> str:
        key = next(keys)
        if key is KeyboardInterrupt:
            raise KeyboardInterrupt
        return key

    monkeypatch.setattr("builtins.input", press)
    outcome = cli("chat", quantized, "--max-new-tokens", "3", "--temperature", "0")
    assert outcome.code == 130
    assert outcome.err.count("[4 bits, ") == 2
    assert outcome.err.count("Ctrl-C again") == 2
    assert next(keys) == "never read"


def test_white_space_alone_is_said(quantized, cli: Command, type_in, monkeypatch):
    reply, texts = Conversation.reply, iter([" \n", "", "x"])
    monkeypatch.setattr(Conversation, "reply", lambda *given: replace(reply(*given), text=next(texts)))
    type_in("the cat", "sat", "on")
    outcome = cli("chat", quantized, "--max-new-tokens", "3")
    said = [line for line in outcome.err.splitlines() if line.startswith("[")]
    assert [line.rpartition("; ")[2] for line in said[:2]] == ["nothing but white space]", "an empty answer]"]
    assert ";" not in said[2]
