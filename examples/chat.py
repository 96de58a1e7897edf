"""Holds a conversation of two turns: the second question refers to the first answer.

python examples/chat.py --model demo
"""

import argparse

from qwenkern import Model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="demo")
args = parser.parse_args()

model = Model.from_pretrained(args.model)
messages = [{"role": "system", "content": "You answer in one short sentence."}]
for question in ("What does the Python function enumerate do?", "Show it in one line of code."):
    messages.append({"role": "user", "content": question})
    answer = model.chat(messages, max_tokens=80)
    messages.append({"role": "assistant", "content": answer.text})  # the model sees the whole conversation each time
    print(f"> {question}\n{answer.text}\n")
