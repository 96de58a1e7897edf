"""Prints an answer while the model writes it, and stops the model after so many characters.

python examples/stream.py --model demo "Write a Python function that reverses a string, and explain it."
"""

import argparse

from qwenkern import Model

parser = argparse.ArgumentParser()
parser.add_argument("question", nargs="?", default="Write a Python function that reverses a string, and explain it.")
parser.add_argument("--characters", type=int, default=200)
parser.add_argument("--model", default="demo")
args = parser.parse_args()

model = Model.from_pretrained(args.model)
messages = [{"role": "user", "content": args.question}]
length = 0
with model.stream(messages, temperature=0.7, top_p=0.9, seed=1, max_tokens=200) as stream:
    for text in stream:  # never half a character
        print(text, end="", flush=True)
        length += len(text)
        if length >= args.characters:
            break  # leaving the block stops the model
print(f"\n[{stream.completion.num_tokens} tokens]")
