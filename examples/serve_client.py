"""Talks to `qwenkern serve --model demo` with the openai client: streams an answer, and asks for one of a JSON schema.

python examples/serve_client.py --url http://127.0.0.1:8000/v1
"""

import argparse
import os

from openai import OpenAI

SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad", "mixed"]}, "is_long": {"type": "boolean"}},
    "required": ["mood", "is_long"],
    "additionalProperties": False,
}

parser = argparse.ArgumentParser()
parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
args = parser.parse_args()

client = OpenAI(base_url=args.url, api_key=os.environ.get("QWENKERN_API_KEY", "none"))  # without a key, any will do
model = client.models.list().data[0].id

question = "What is a prime number?"
for chunk in client.chat.completions.create(
    model=model, messages=[{"role": "user", "content": question}], max_tokens=60, temperature=0, stream=True
):
    print(chunk.choices[0].delta.content or "", end="", flush=True)

review = client.chat.completions.create(
    model=model,
    messages=[{"role": "user", "content": "Rate this review: I laughed, and then I fell asleep."}],
    response_format={"type": "json_schema", "json_schema": {"name": "rating", "schema": SCHEMA}},
    max_tokens=60,
)
print(f"\n{review.choices[0].message.content}")
