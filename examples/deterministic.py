"""Gives a prompt the same tokens and the same bits of their log-probabilities in whatever batch it comes.

python examples/deterministic.py --model demo
"""

import argparse

from qwenkern import Model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="demo")
args = parser.parse_args()

model = Model.from_pretrained(args.model, deterministic=True)
prompt, others = "def quicksort(items):", ["The sea is", "Once upon a time", "import os\n"]
by_itself = model.generate(prompt, max_tokens=20, logprobs=0)
in_a_batch = model.generate([*others, prompt], max_tokens=20, logprobs=0)[-1]
print("same tokens:", by_itself.token_ids == in_a_batch.token_ids)
print("same log-probabilities:", by_itself.logprobs == in_a_batch.logprobs)
