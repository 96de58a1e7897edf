# ruff: noqa: E501  (a schema a line)
"""JSON schemas of the kind that people write: a list, and a generator of any number of others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]


def schemas(count: int) -> Iterator[tuple[str, Schema]]:
    """``count`` schemas, each with a name: those of the list first, then generated ones. Always the same."""
    yield from list(WRITTEN.items())[:count]
    for number in range(count - len(WRITTEN)):
        yield f"generated {number}", Maker(number).root()


def obj(properties: Schema, required: list[str] | None = None, **more: Any) -> Schema:
    """A closed object. All properties are required unless ``required`` is given."""
    needed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False} | more


def array(items: Any, **more: Any) -> Schema:
    return {"type": "array", "items": items, "maxItems": 4} | more


TEXT = {"type": "string", "maxLength": 12}
WHOLE = {"type": "integer", "minimum": 0, "maximum": 1000}
NODE = {"$ref": "#/$defs/node"}
ADDRESS = obj({"street": TEXT, "city": TEXT, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}})

WRITTEN: dict[str, Schema] = {
    "any object": {"type": "object"},
    "a person": obj({"name": TEXT, "age": {"type": "integer", "minimum": 0, "maximum": 130}, "email": {"type": "string", "format": "email"}}, ["name", "age"]),
    "an address within an order": obj({"id": {"type": "string", "format": "uuid"}, "ship_to": ADDRESS, "bill_to": {"anyOf": [ADDRESS, {"type": "null"}]}, "total": {"type": "number", "minimum": 0, "exclusiveMaximum": 100000}}),
    "an extraction": obj({"entities": array(obj({"text": TEXT, "label": {"enum": ["PERSON", "ORG", "PLACE", "DATE"]}, "confidence": {"type": "number", "minimum": 0, "maximum": 1}}))}),
    "a classification": obj({"label": {"enum": ["positive", "negative", "neutral"]}, "score": {"type": "number", "minimum": -1, "maximum": 1}, "reason": TEXT}),
    "a tree": {"$ref": "#/$defs/node", "$defs": {"node": obj({"value": WHOLE, "children": array(NODE, maxItems=2)})}},
    "a linked list": {"$defs": {"node": obj({"value": TEXT, "next": {"anyOf": [NODE, {"type": "null"}]}})}, "$ref": "#/$defs/node"},
    "a recursion to the root": obj({"name": TEXT, "sub": array({"$ref": "#"}, maxItems=2)}, ["name"]),
    "shapes by anyOf": obj({"shape": {"anyOf": [obj({"kind": {"const": "circle"}, "radius": WHOLE}), obj({"kind": {"const": "square"}, "side": WHOLE})]}}),
    "shapes by oneOf": obj({"shape": {"oneOf": [obj({"kind": {"const": "circle"}, "radius": WHOLE}), obj({"kind": {"const": "square"}, "side": WHOLE})]}}),
    "oneOf of types": {"oneOf": [{"type": "integer", "maximum": 9, "minimum": 0}, {"type": "string", "maxLength": 3}, {"type": "null"}]},
    "oneOf that overlaps": {"oneOf": [{"type": "integer", "minimum": 0}, {"type": "integer", "maximum": 10}]},
    "allOf with a base": {"allOf": [{"$ref": "#/$defs/base"}, {"type": "object", "properties": {"extra": WHOLE}, "required": ["extra"]}], "$defs": {"base": {"type": "object", "properties": {"id": WHOLE}, "required": ["id"]}}, "unevaluatedProperties": False},
    "allOf of bounds": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 12}]},
    "allOf of patterns": {"allOf": [{"type": "string", "pattern": "^a"}, {"pattern": "b$"}, {"maxLength": 6}]},
    "a map": {"type": "object", "additionalProperties": WHOLE, "maxProperties": 3},
    "a map that is not empty": {"type": "object", "additionalProperties": WHOLE, "minProperties": 1, "maxProperties": 2},
    "a map of at least two": {"type": "object", "additionalProperties": WHOLE, "minProperties": 2, "maxProperties": 3},
    "keys by a pattern": {"type": "object", "patternProperties": {"^[a-z]{1,3}$": WHOLE}, "additionalProperties": False, "maxProperties": 3},
    "keys by two patterns": {"type": "object", "patternProperties": {"^n_[a-z]{1,3}$": WHOLE, "^t_[a-z]{1,3}$": TEXT}, "additionalProperties": False, "maxProperties": 3},
    "known keys and others": {"type": "object", "properties": {"id": WHOLE}, "required": ["id"], "additionalProperties": TEXT},
    "an open object": {"type": "object", "properties": {"id": WHOLE, "tag": TEXT}, "required": ["id"]},
    "a tuple": {"type": "array", "prefixItems": [WHOLE, TEXT, {"type": "boolean"}], "items": False, "minItems": 3},
    "a tuple and a rest": {"type": "array", "prefixItems": [TEXT], "items": WHOLE, "minItems": 1, "maxItems": 4},
    "a matrix": array(array({"type": "number", "minimum": -10, "maximum": 10}, minItems=2, maxItems=2), minItems=2, maxItems=2),
    "a date": obj({"day": {"type": "string", "format": "date"}}),
    "a time": obj({"at": {"type": "string", "format": "time"}}),
    "a date and time": obj({"at": {"type": "string", "format": "date-time"}}),
    "a duration": obj({"for": {"type": "string", "format": "duration"}}),
    "addresses of a host": obj({"v4": {"type": "string", "format": "ipv4"}, "v6": {"type": "string", "format": "ipv6"}, "name": {"type": "string", "format": "hostname"}}),
    "a link": obj({"href": {"type": "string", "format": "uri"}}),
    "a pointer": obj({"at": {"type": "string", "format": "json-pointer"}}),
    "an expression": obj({"rule": {"type": "string", "format": "regex"}}),
    "a format of one's own": obj({"colour": {"type": "string", "format": "colour"}}),
    "a hexadecimal colour": obj({"colour": {"type": "string", "pattern": "^#[0-9a-fA-F]{6}$"}}),
    "a version": obj({"version": {"type": "string", "pattern": "^\\d{1,3}\\.\\d{1,3}\\.\\d{1,3}(-[a-z]{1,8})?$"}}),
    "a phone number": obj({"phone": {"type": "string", "pattern": "^\\+?[0-9 ()-]{7,15}$"}}),
    "a pattern within": obj({"word": {"type": "string", "pattern": "ab", "maxLength": 8}}),
    "a pattern that looks ahead": obj({"password": {"type": "string", "pattern": "^(?=.*[0-9])[a-z0-9]{8,12}$"}}),
    "a number of cents": obj({"price": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 100}}),
    "multiples of five": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    "numbers without bounds": obj({"x": {"type": "number"}, "n": {"type": "integer"}}),
    "bounds that exclude": obj({"x": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, "n": {"type": "integer", "exclusiveMinimum": -5, "exclusiveMaximum": 5}}),
    "bounds with fractions": obj({"x": {"type": "number", "minimum": 0.125, "maximum": 99.75}, "n": {"type": "integer", "minimum": 1.5, "maximum": 7.5}}),
    "a list of different ones": array(WHOLE, uniqueItems=True),
    "a list that contains": {"type": "array", "contains": {"const": 1}, "maxItems": 3},
    "not": {"type": "string", "not": {"const": "a"}, "maxLength": 3},
    "if then else": {"type": "object", "properties": {"a": WHOLE}, "if": {"required": ["a"]}, "then": {"required": ["b"]}, "else": {"required": ["c"]}},
    "dependent required": {"type": "object", "properties": {"a": WHOLE, "b": WHOLE}, "dependentRequired": {"a": ["b"]}},
    "names of properties": {"type": "object", "propertyNames": {"pattern": "^[a-z]{1,3}$"}, "additionalProperties": WHOLE, "maxProperties": 2},
    "a schema elsewhere": {"$ref": "https://example.com/schema.json"},
    "a definition that is missing": {"$ref": "#/$defs/missing"},
    "an anchor": {"$ref": "#item", "$defs": {"item": {"$anchor": "item", "type": "integer", "minimum": 0, "maximum": 9}}},
    "old definitions": {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"n": WHOLE}, **obj({"n": {"$ref": "#/definitions/n"}})},
    "a reference with siblings": obj({"n": {"$ref": "#/$defs/n", "maximum": 5, "description": "a small one"}}, **{"$defs": {"n": WHOLE}}),
    "two that refer to each other": {"$ref": "#/$defs/a", "$defs": {"a": obj({"b": {"anyOf": [{"$ref": "#/$defs/b"}, {"type": "null"}]}}), "b": obj({"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}})}},
    "several types": obj({"value": {"type": ["string", "integer", "null"], "maxLength": 6, "minimum": 0, "maximum": 99}}),
    "nullable": obj({"value": {"anyOf": [TEXT, {"type": "null"}], "default": None, "title": "Value"}}),
    "an enum of many kinds": {"enum": ["a", 1, 2.5, None, True, [1, 2], {"k": "v"}]},
    "a constant object": {"const": {"a": [1, 2, {"b": None}], "c": "text \" with \\ quotes"}},
    "texts beyond ASCII": obj({"größe": {"enum": ["klein", "groß"]}, "名前": {"type": "string", "maxLength": 4}, "emoji 🙂": {"const": "👍🏽"}}),
    "a text with escapes": obj({"line": {"const": "a\nb\tc\u0001"}, "quote\"d": WHOLE}),
    "lengths of texts": obj({"short": {"type": "string", "minLength": 2, "maxLength": 4}, "exact": {"type": "string", "minLength": 3, "maxLength": 3}}),
    "an empty object": obj({}),
    "an empty list": {"type": "array", "maxItems": 0},
    "booleans": array({"type": "boolean"}, minItems=3),
    "null": {"type": "null"},
    "a lone text": TEXT,
    "a lone number": {"type": "number", "minimum": 0, "maximum": 10},
    "true within": obj({"anything": True}),
    "false within": {"type": "object", "properties": {"never": False, "id": WHOLE}, "required": ["id"], "additionalProperties": False},
    "required but not described": {"type": "object", "properties": {"a": WHOLE}, "required": ["a", "b"], "additionalProperties": TEXT},
    "all optional": obj({"a": WHOLE, "b": TEXT, "c": {"type": "boolean"}}, []),
    "one of the optional at least": obj({"a": WHOLE, "b": TEXT}, [], minProperties=1),
    "titles and examples": obj({"name": {"type": "string", "title": "Name", "description": "the name", "examples": ["Ann"], "default": "Ann", "maxLength": 5, "deprecated": True, "readOnly": True}}, title="Thing", description="a thing", **{"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "https://example.com/thing"}),
    "a call of a function": obj({"name": {"const": "get_weather"}, "arguments": obj({"city": TEXT, "unit": {"enum": ["celsius", "fahrenheit"]}}, ["city"])}),
    "one of several functions": {"anyOf": [obj({"name": {"const": name}, "arguments": obj({"q": TEXT})}) for name in ("search", "open", "close")]},
    "steps of reasoning": obj({"steps": array(obj({"explanation": TEXT, "output": TEXT}), maxItems=3), "final_answer": TEXT}),
    "a chart": obj({"type": {"enum": ["bar", "line"]}, "data": obj({"labels": array(TEXT), "series": array(array({"type": "number", "minimum": 0, "maximum": 9}, maxItems=3), maxItems=2)})}),
    "a discriminator": {"oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}], "discriminator": {"propertyName": "pet", "mapping": {"cat": "#/$defs/Cat", "dog": "#/$defs/Dog"}}, "$defs": {"Cat": obj({"pet": {"const": "cat", "type": "string"}, "lives": WHOLE}), "Dog": obj({"pet": {"const": "dog", "type": "string"}, "good": {"type": "boolean"}})}},
    "oneOf of open objects": {"oneOf": [{"type": "object", "properties": {"a": WHOLE}, "required": ["a"]}, {"type": "object", "properties": {"b": WHOLE}, "required": ["b"]}]},
    "a type without a name": {"type": "text"},
    "items as a list": {"$schema": "http://json-schema.org/draft-07/schema#", "type": "array", "items": [WHOLE, TEXT], "maxItems": 2},
    "an impossible bound": {"type": "integer", "minimum": 5, "maximum": 4},
    "an impossible property": obj({"n": {"allOf": [{"type": "integer"}, {"type": "string"}]}}),
}  # fmt: skip


class Maker:
    """Makes one schema from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._defs: Schema = {}

    def root(self) -> Schema:
        made = self._object(0) if self._random.random() < 0.8 else self._any(0)
        if self._defs:
            made = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | made | {"$defs": self._defs}
        return made

    def _any(self, depth: int) -> Schema:
        leaves = [self._text, self._integer, self._number, self._enum, self._pattern, self._format, self._small]
        inner = [
            self._object,
            self._object,
            self._array,
            self._array,
            self._union,
            self._reference,
            self._all,
            self._map,
        ]
        pick = self._random.choice(leaves if depth >= 3 or self._random.random() < 0.55 else inner)
        made = pick(depth)
        if self._random.random() < 0.1:
            made = {"description": "what this is for", "title": "A title"} | made
        return made

    def _object(self, depth: int) -> Schema:
        names = self._random.sample(NAMES, self._random.randint(1, 4))
        properties = {name: self._any(depth + 1) for name in names}
        required = [name for name in names if self._random.random() < 0.7]
        made: Schema = {"type": "object", "properties": properties, "required": required}
        if self._random.random() < 0.85:
            made["additionalProperties"] = False
        elif self._random.random() < 0.5:
            made["additionalProperties"] = self._integer(depth)
        return made

    def _array(self, depth: int) -> Schema:
        low = self._random.randint(0, 2)
        made: Schema = {"type": "array", "items": self._any(depth + 1), "minItems": low, "maxItems": low + 2}
        if self._random.random() < 0.1:
            made = {"type": "array", "prefixItems": [self._any(depth + 1) for _ in range(2)], "items": False}
        if self._random.random() < 0.05:
            made["uniqueItems"] = True
        return made

    def _union(self, depth: int) -> Schema:
        how = self._random.choice(["anyOf", "anyOf", "oneOf"])
        if how == "oneOf" and self._random.random() < 0.7:  # a constant distinguishes the alternatives
            tags = self._random.sample(WORDS, 2)
            return {"oneOf": [obj({"type": {"const": tag}, "value": self._any(depth + 1)}) for tag in tags]}
        return {how: [self._any(depth + 1) for _ in range(self._random.randint(2, 3))]}

    def _reference(self, depth: int) -> Schema:
        ready = [name for name, schema in self._defs.items() if schema]
        if not ready or self._random.random() < 0.5:
            name = f"Def{len(self._defs)}"
            self._defs[name] = {}  # not ready: a reference to it now could make an endless recursion
            if self._random.random() < 0.3:
                again = {"anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]}
                self._defs[name] = obj({"item": self._any(3), "next": again})
            else:
                self._defs[name] = self._any(max(depth + 1, 2))
            ready.append(name)
        return {"$ref": f"#/$defs/{self._random.choice(ready)}"}

    def _all(self, depth: int) -> Schema:
        if self._random.random() < 0.5:
            return {"allOf": [self._integer(depth), {"minimum": self._random.randint(-5, 5)}]}
        parts = []
        for name in self._random.sample(NAMES, 2):
            parts.append({"type": "object", "properties": {name: self._any(3)}, "required": [name]})
        return {"allOf": parts}

    def _map(self, depth: int) -> Schema:
        made: Schema = {"type": "object", "additionalProperties": self._any(depth + 1), "maxProperties": 2}
        if self._random.random() < 0.3:
            pattern = self._random.choice(["^[a-z]{2}$", "^x-[a-z]{1,5}$", "^[A-Z_]{1,4}$"])
            made = {
                "type": "object",
                "patternProperties": {pattern: self._any(depth + 1)},
                "additionalProperties": False,
            }
        return made

    def _text(self, _: int) -> Schema:
        low = self._random.choice([0, 0, 0, 1, 3])
        return {"type": "string", "minLength": low, "maxLength": low + self._random.randint(0, 9)}

    def _integer(self, _: int) -> Schema:
        low, high = sorted(self._random.sample(range(-200, 2000), 2))
        made: Schema = {"type": "integer", "minimum": low, "maximum": high}
        if self._random.random() < 0.15:
            made["multipleOf"] = self._random.choice([2, 5, 10])
        return made

    def _number(self, _: int) -> Schema:
        low = round(self._random.uniform(-10, 10), 2)
        high = round(low + self._random.uniform(0.5, 100), 2)
        return self._random.choice(
            [
                {"type": "number", "minimum": low, "maximum": high},
                {"type": "number", "exclusiveMinimum": low, "maximum": high},
            ]
        )

    def _enum(self, _: int) -> Schema:
        words: list[Any] = self._random.sample(WORDS, self._random.randint(2, 5))
        if self._random.random() < 0.2:
            words += [None, self._random.randint(0, 9)]
        return self._random.choice([{"enum": words}, {"const": words[0]}])

    def _pattern(self, _: int) -> Schema:
        return {"type": "string", "pattern": self._random.choice(PATTERNS)}

    def _format(self, _: int) -> Schema:
        return {"type": "string", "format": self._random.choice(FORMATS)}

    def _small(self, _: int) -> Schema:
        kinds: list[Schema] = [{"type": "boolean"}, {"type": "null"}, {"type": ["string", "null"], "maxLength": 5}]
        return self._random.choice(kinds)


NAMES = ["id", "name", "title", "kind", "tags", "created_at", "price", "owner", "items", "status", "meta-data", "ключ"]
WORDS = ["red", "green", "blue", "low", "high", "todo", "in progress", "done", "北", 'a "quoted" one', "back\\slash"]
PATTERNS = [
    "^[A-Z]{2}[0-9]{3}$", "^[a-z]+(-[a-z]+){0,2}$", "^(yes|no|maybe)$", "^\\d{4}-\\d{2}$", "^[^@\\s]{1,8}@[a-z]{1,8}\\.com$",
    "^0x[0-9a-f]{1,8}$", "[0-9]", "^\\w{1,8}$", "^.{1,5}$", "^(?:[a-z]{1,3}\\.){1,2}[a-z]{2}$",
]  # fmt: skip
FORMATS = ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]
