"""The built-in chats: questions about Python's own library, tool calls, and answers in JSON. No file is needed.

    library   what a function of the standard library of this machine does, answered by its documentation
    tools     a request, the call of a tool with its arguments, the tool's result, and a sentence about it
    json      a sentence and the keys to fill in, answered with a JSON object and nothing else

They alternate, three of the library to one each of the others, and are the same at every run. The parts "calibration"
and "heldout" have no request, module, city, person or thing in common.
"""

from __future__ import annotations

import ast
import json
import random
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

from .chats import Chat, Message
from .data import stdlib_documents

PARTS = ("calibration", "heldout")
EACH = 240  # chats of tools, and of JSON, a part
DECISIONS = 32  # of each, where only these are asked for
LIBRARY = 3  # chats of the library to each of them
LONGEST_ANSWER = 1200  # characters

CITIES = (
    *("Lisbon", "Oslo", "Nairobi", "Lima", "Hanoi", "Dublin", "Porto", "Tunis", "Quito", "Turin", "Bergen", "Accra"),
    *("Osaka", "Leeds", "Lyon", "Graz"),
)
PEOPLE = (
    *("Maria", "Jonas", "Aisha", "Tom", "Yuki", "Carlos", "Nina", "Omar", "Elena", "David", "Priya", "Lucas", "Hanna"),
    *("Samuel", "Ines", "Viktor"),
)
THINGS = [
    *("desk lamp", "winter coat", "coffee grinder", "bicycle pump", "garden chair", "phone case", "rain jacket"),
    *("notebook", "water bottle", "tea kettle", "tent", "backpack", "keyboard", "wall clock", "umbrella", "toaster"),
]
MEETINGS = [
    *("Budget review", "Dentist", "Team lunch", "Piano lesson", "Project kickoff", "Call with the bank", "Book club"),
    *("Car service", "Yoga class", "Parents' evening", "Sprint planning", "Haircut", "Job interview", "Choir practice"),
    *("Flat viewing", "Chess night"),
]
WEATHER = ("sunny", "cloudy", "rainy", "windy", "foggy", "clear")
OPINIONS = {
    "positive": ("I love it, it works perfectly.", "Great quality, I would buy it again.", "Better than I expected."),
    "negative": ("It broke after two days.", "Far too loud, I sent it back.", "The worst one I ever had."),
    "neutral": ("It does what it says.", "It arrived on Tuesday.", "Neither good nor bad."),
}


def made_chats(part: str | None = None) -> list[Chat]:
    """The built-in chats of a part, or of both."""
    return [chat for one in (PARTS if part is None else (part,)) for chat in _made(one)]


def decision_chats(part: str = "heldout") -> list[Chat]:
    """Those of `made_chats` that call tools or answer in JSON: quick, as no source of the library is read."""
    words = _Words(part)
    return [chat for _ in range(DECISIONS) for chat in (_tool_chat(words), _json_chat(words))]


def _made(part: str) -> Iterator[Chat]:
    words, library = _Words(part), _library_chats(part)
    for _ in range(EACH):
        yield from islice(library, LIBRARY)
        yield _tool_chat(words)
        yield _json_chat(words)
    yield from library


class _Words:
    """Draws words; the lists of the two parts are disjoint."""

    def __init__(self, part: str) -> None:
        self.draw, place = random.Random(part), PARTS.index(part)
        self._place = place
        # of four words the last is held out
        self._lists = {
            name: [word for number, word in enumerate(words) if (number % 4 == 3) == bool(place)]
            for name, words in (("city", CITIES), ("person", PEOPLE), ("thing", THINGS), ("meeting", MEETINGS))
        }

    def one(self, name: str) -> str:
        return self.draw.choice(self._lists[name])

    def date(self) -> str:
        return f"2025-{self.draw.randint(1, 12):02d}-{self.draw.randint(1, 28):02d}"

    def amount(self) -> int:
        """Tens: even ones for calibration, odd ones held out."""
        tens = self.draw.randint(5, 95)
        return 10 * (tens - tens % 2 + self._place)

    def time(self) -> str:
        return f"{self.draw.randint(8, 19):02d}:{self.draw.choice(('00', '15', '30', '45'))}"


def _tool(name: str, description: str, **properties: str) -> dict[str, Any]:
    """A tool's JSON schema; each property's type is that of JSON."""
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": kind} for key, kind in properties.items()},
                "required": list(properties),
            },
        },
    }


TOOLS = (
    _tool("get_weather", "The weather in a city now.", city="string"),
    _tool("create_event", "Put an event into the calendar.", title="string", date="string", time="string"),
    _tool("convert_currency", "Convert an amount of money.", amount="number", source="string", target="string"),
    _tool("send_message", "Send a message to a contact.", recipient="string", text="string"),
    _tool("find_product", "Search the shop.", query="string", max_price="number"),
)


def _tool_chat(words: _Words) -> Chat:
    """A request that one of the tools can answer, the call, its result, and what the model makes of it."""
    draw = words.draw
    tool = draw.choice(TOOLS)["function"]["name"]
    city, person, thing, title = (words.one(name) for name in ("city", "person", "thing", "meeting"))
    date, time, amount = words.date(), words.time(), words.amount()
    arguments: dict[str, Any]
    if tool == "get_weather":
        sky, degrees = draw.choice(WEATHER), draw.randint(-5, 33)
        asked = draw.choice((f"What is the weather like in {city}?", f"Do I need a coat in {city} today?"))
        arguments, result = {"city": city}, {"sky": sky, "degrees": degrees}
        said = f"It is {sky} in {city}, at {degrees} degrees."
    elif tool == "create_event":
        asked = draw.choice(
            (f"Put {title} into my calendar on {date} at {time}.", f"{title}, {date}, {time}: note it.")
        )
        arguments, result = {"title": title, "date": date, "time": time}, {"created": True}
        said = f"{title} is in your calendar on {date} at {time}."
    elif tool == "convert_currency":
        source, target = draw.sample(("EUR", "USD", "GBP", "JPY", "CHF"), 2)
        asked = draw.choice((f"How much is {amount} {source} in {target}?", f"Convert {amount} {source} to {target}."))
        arguments = {"amount": amount, "source": source, "target": target}
        result = {"amount": round(amount * draw.uniform(0.6, 1.6), 2)}
        said = f"{amount} {source} are {result['amount']} {target}."
    elif tool == "send_message":
        text = f"I will be there on {date} at {time}."
        asked = draw.choice((f"Tell {person}: {text}", f"Write to {person} that I will be there on {date} at {time}."))
        arguments, result = {"recipient": person, "text": text}, {"sent": True}
        said = f"I have sent it to {person}."
    else:
        asked = draw.choice(
            (f"Find a {thing} for at most {amount} euros.", f"I need a {thing}, not above {amount} euros.")
        )
        price = round(amount * draw.uniform(0.4, 1.0), 2)
        arguments, result = {"query": thing, "max_price": amount}, {"name": thing, "price": price}
        said = f"There is a {thing} for {price} euros."
    call = {"type": "function", "function": {"name": tool, "arguments": arguments}}
    messages: list[Message] = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": tool, "content": json.dumps(result)},
        {"role": "assistant", "content": said},
    ]
    return Chat(tuple(messages), TOOLS)


def _json_chat(words: _Words) -> Chat:
    """Two sentences to be turned into JSON, one after the other: the first shows what is wanted."""
    kind = words.draw.choice((_order, _opinion, _appointment))
    messages: list[Message] = []
    for turn in range(2):
        keys, sentence, value = kind(words)
        asked = f"Answer with a JSON object only, with the keys {keys}.\n\n" if turn == 0 else ""
        messages.append({"role": "user", "content": asked + sentence})
        messages.append({"role": "assistant", "content": json.dumps(value)})
    return Chat(tuple(messages))


def _order(words: _Words) -> tuple[str, str, dict[str, Any]]:
    person, thing, city, count = words.one("person"), words.one("thing"), words.one("city"), words.draw.randint(1, 9)
    value = {"customer": person, "item": thing, "quantity": count, "city": city}
    return "customer, item, quantity, city", f"{person} from {city} orders {count} times the {thing}.", value


def _opinion(words: _Words) -> tuple[str, str, dict[str, Any]]:
    thing, feeling = words.one("thing"), words.draw.choice(list(OPINIONS))
    said = words.draw.choice(OPINIONS[feeling])
    return "product, sentiment", f"Review of a {thing}: {said}", {"product": thing, "sentiment": feeling}


def _appointment(words: _Words) -> tuple[str, str, dict[str, Any]]:
    title, person, date, time = words.one("meeting"), words.one("person"), words.date(), words.time()
    value = {"title": title, "with": person, "date": date, "time": time}
    return "title, with, date, time", f"{title} with {person} on {date}, {time}.", value


def _library_chats(part: str) -> Iterator[Chat]:
    """Modules in an order of their own, two functions a chat."""
    modules = stdlib_documents(part)
    random.Random(part).shuffle(modules)
    for source in modules:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes in old sources
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue  # a few modules are deliberately broken
        turns = [turn for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for turn in _explained(node)]
        for start in range(0, len(turns), 4):
            yield Chat(tuple(turns[start : start + 4]))


def _explained(node: ast.FunctionDef) -> list[Message]:
    """A question about the function and its documentation as the answer; nothing if it has none."""
    said = ast.get_docstring(node)
    if not said or len(said) < 40 or node.name.startswith("_"):
        return []
    heading = f"def {node.name}({ast.unparse(node.args)})"
    return [
        {"role": "user", "content": f"What does this Python function do?\n\n```python\n{heading}: ...\n```"},
        {"role": "assistant", "content": said[:LONGEST_ANSWER].rstrip()},
    ]
