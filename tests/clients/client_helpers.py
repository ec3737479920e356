"""What the clients' tests ask for, and plain HTTP to compare with."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

WAIT = 120  # seconds before a test gives up; no test measures time
NAME = "small"
USER = [{"role": "user", "content": "write a loop"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "the weather", "parameters": PARAMETERS}}


class Weather(BaseModel):
    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 3]


@dataclass(frozen=True)
class Running:
    """url: without /v1. folder: the checkpoint."""

    url: str
    folder: Path

    @property
    def v1(self) -> str:
        return f"{self.url}/v1"

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """What plain HTTP gets."""
        asked = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(asked, timeout=WAIT) as answer:
            return json.load(answer)


def is_weather(arguments: Any) -> bool:
    return (
        arguments.keys() == {"city", "days"}
        and arguments["city"] in ("Rome", "Oslo")
        and arguments["days"] in range(10)
    )
