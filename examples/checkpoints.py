"""Loads models by name, from a folder of safetensors or from a GGUF file, and says what each one is.

python examples/checkpoints.py demo path/to/folder path/to/model.gguf
"""

import argparse
import time

from qwenkern import Error, Model

parser = argparse.ArgumentParser()
parser.add_argument("models", nargs="*", default=["demo"])
args = parser.parse_args()

for name in args.models:
    started = time.perf_counter()
    try:
        model = Model.from_pretrained(name, dtype="auto")  # GGUF's blocks become bfloat16
    except Error as error:  # it names the file or tensor, what was found and what was expected
        print(f"{name}: {error}")
        continue
    config, seconds = model.config, time.perf_counter() - started
    print(f"{name}: {config.num_parameters:,} parameters, layers: {config.num_hidden_layers}, {model.dtype}")
    print(f"  on {model.device} in {seconds:.1f} s; room for {model.cache.num_tokens:,} tokens in the cache")
    print(f"  {model.generate('Hello', max_tokens=8).text!r}")
