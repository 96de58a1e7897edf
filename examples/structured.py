"""Gets answers that parse: JSON of a schema, one of a few words, a text that an expression matches.

python examples/structured.py --model demo
"""

import argparse
import json

from qwenkern import Model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="demo")
args = parser.parse_args()

city = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "country": {"type": "string", "maxLength": 40},
        "inhabitants": {"type": "integer", "minimum": 0, "maximum": 100_000_000},
        "is_capital": {"type": "boolean"},
    },
    "required": ["name", "country", "inhabitants", "is_capital"],
    "additionalProperties": False,
}

model = Model.from_pretrained(args.model)
answer = model.chat([{"role": "user", "content": "Describe Paris as JSON."}], json_schema=city, max_tokens=400)
for name, value in json.loads(answer.text).items():
    print(f"{name}: {value!r}")

question = [{"role": "user", "content": "Is 'what a day' praise or blame?"}]
print(model.chat(question, choice=["praise", "blame", "unclear"], max_tokens=20).text)

question = [{"role": "user", "content": "When did people first walk on the Moon? Year-month-day."}]
print(model.chat(question, regex=r"[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]", max_tokens=20).text)
