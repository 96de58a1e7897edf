"""Messages that the tests of clients send to the parrot (parrot.py), and the key of its server."""

from __future__ import annotations

import pydantic

from qwenkern.server.settings import Settings

KEY = "sk-secret"
SETTINGS = Settings(api_keys=(KEY,))
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


class City(pydantic.BaseModel):
    name: str
    people: int


OSLO = City(name="Oslo", people=700_000)


def said(text: str, role: str = "user") -> list[dict]:
    """Messages after which the model answers with this text."""
    return [{"role": role, "content": f"Say [[{text}]]"}]
