"""Completes several prompts of different lengths together, two samples each, with log-probabilities.

python examples/batch.py --model demo
"""

import argparse

from qwenkern import Model, SamplingParams

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="demo")
args = parser.parse_args()

model = Model.from_pretrained(args.model)
prompts = ["The sea is", "A list in Python is", "import numpy as"]
params = SamplingParams(temperature=0.8, top_k=40, seed=1, n=2, max_tokens=12, stop="\n", logprobs=0)
for completion in model.generate(prompts, params):  # one batch, without padding; prompt by prompt, n of each
    total = sum(token.logprob for token in completion.logprobs or [])
    prompt = prompts[completion.prompt_index]
    print(f"{total:8.2f}  sample {completion.sample_index}  {prompt}{completion.text}")
