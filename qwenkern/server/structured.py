"""The fields that constrain an answer: OpenAI's `response_format`, and vLLM's `structured_outputs` and `guided_*`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from .bodies import Body, Some
from .errors import ApiError


class JsonSchema(Body):
    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None  # answers always follow the schema


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    json_: dict[str, Any] | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Some[str] | None = None
    grammar: str | None = None


class Structured(Body):
    """A body with the fields that constrain the answer."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Some[str] | None = None
    guided_grammar: str | None = None

    def _forms(self) -> list[tuple[str, str, Any]]:
        """Each constraint in the body: (field of the body, field of SamplingParams, value)."""
        asked, outputs = self.response_format, self.structured_outputs or StructuredOutputs(json=None)
        found: list[tuple[str, str, Any]] = [
            ("structured_outputs.json", "json_schema", outputs.json_),
            ("structured_outputs.json_object", "json_schema", outputs.json_object or None),
            ("structured_outputs.regex", "regex", outputs.regex),
            ("structured_outputs.choice", "choice", outputs.choice),
            ("structured_outputs.grammar", "grammar", outputs.grammar),
            ("guided_json", "json_schema", self.guided_json),
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
            ("guided_grammar", "grammar", self.guided_grammar),
        ]
        if asked and asked.type == "json_object":
            found.append(("response_format", "json_schema", True))
        if asked and asked.type == "json_schema":
            schema = asked.json_schema.schema_ if asked.json_schema else None
            found.append(("response_format.json_schema.schema", "json_schema", True if schema is None else schema))
        return [each for each in found if each[2] is not None]

    def form(self) -> dict[str, Any]:
        """The constraint as a field of SamplingParams; empty if there is none. Raises ApiError, also for several."""
        asked, forms = self.response_format, self._forms()
        if asked and (asked.json_schema is not None) != (asked.type == "json_schema"):
            message = "response_format.json_schema goes with the type json_schema, and only with that"
            raise ApiError(400, message, param="response_format.json_schema", code="invalid_value")
        if len(forms) > 1:
            given = " and ".join(name for name, _, _ in forms)
            raise ApiError(400, f"{given} are given; expected one of them", param=forms[1][0], code="invalid_value")
        return {name: value for _, name, value in forms}

    def names(self) -> dict[str, str]:
        return super().names() | {name: place for place, name, _ in self._forms()}
