"""Reads a long document once, saves what the model has read, and answers questions about it in another model.

python examples/remember_a_prefix.py --model demo README.md
"""

import argparse
import tempfile
import time
from pathlib import Path

from qwenkern import Model

parser = argparse.ArgumentParser()
parser.add_argument("document", nargs="?", default=__file__)
parser.add_argument("--model", default="demo")
args = parser.parse_args()

text = f"Here is a document.\n\n{Path(args.document).read_text(encoding='utf-8')[:4000]}\n\n"
with tempfile.TemporaryDirectory() as folder, Model.from_pretrained(args.model) as model:
    started = time.perf_counter()
    count = model.save_prefix(text, f"{folder}/document.safetensors")
    print(f"read and saved {count} tokens in {time.perf_counter() - started:.2f} s")
    with Model.from_pretrained(args.model) as other:  # as after a restart
        started = time.perf_counter()
        other.load_prefix(f"{folder}/document.safetensors")
        print(f"loaded them in {time.perf_counter() - started:.2f} s")
        for question in ("Question: what is it about?\nAnswer:", "Question: who would read it?\nAnswer:"):
            answer = other.generate(text + question, temperature=0, max_tokens=30)
            print(
                f"[{answer.num_cached_tokens} of {answer.num_prompt_tokens} prompt tokens were there] {answer.text!r}"
            )
