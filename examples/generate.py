"""Completes a text: greedy decoding, at most 60 new tokens.

python examples/generate.py --model demo "def fibonacci(n):"
"""

import argparse

from qwenkern import Model

parser = argparse.ArgumentParser()
parser.add_argument("prompt", nargs="?", default="def fibonacci(n):")
parser.add_argument("--model", default="demo")
args = parser.parse_args()

model = Model.from_pretrained(args.model)
completion = model.generate(args.prompt, max_tokens=60)
print(args.prompt + completion.text)
print(f"[{completion.num_tokens} tokens, ended by {completion.finish_reason}]")
