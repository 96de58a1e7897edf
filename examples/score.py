"""Scores texts by their perplexity: which of two sentences does the model find more likely?

python examples/score.py --model demo "The cat sat on the mat." "The cat sat on the of."
"""

import argparse

from qwenkern import Model

parser = argparse.ArgumentParser()
parser.add_argument("texts", nargs="*", default=["The cat sat on the mat.", "The cat sat on the of."])
parser.add_argument("--model", default="demo")
args = parser.parse_args()

model = Model.from_pretrained(args.model)
for text in args.texts:
    score = model.score(text)
    print(f"perplexity {score.perplexity:10.2f}  {len(score.token_ids):4} tokens  {text}")
