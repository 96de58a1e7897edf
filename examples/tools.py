"""Lets the model call a function of yours: schema in, a call in <tool_call> tags out, its result back.

python examples/tools.py --model demo
"""

import argparse
import json
import re

from qwenkern import Model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="demo")
args = parser.parse_args()


def multiply(a: float, b: float) -> float:
    return a * b


number = {"type": "number"}
parameters = {"type": "object", "properties": {"a": number, "b": number}, "required": ["a", "b"]}
function = {"name": "multiply", "description": "Multiplies two numbers.", "parameters": parameters}
tools = [{"type": "function", "function": function}]

model = Model.from_pretrained(args.model)
messages = [{"role": "user", "content": "What is 1234 times 5678? Use the tool."}]
answer = model.chat(messages, tools=tools, max_tokens=100)
print(answer.text)
if found := re.search(r"\{.*\}", answer.text, re.DOTALL):  # a model may also answer without a call
    call = json.loads(found.group())
    messages.append({"role": "assistant", "content": answer.text})
    messages.append({"role": "tool", "content": str(multiply(**call["arguments"]))})
    print(model.chat(messages, tools=tools, max_tokens=100).text)  # a very small model may repeat the call
