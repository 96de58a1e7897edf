"""Compiles a grammar in a process whose time and memory the system limits. llguidance limits most of its own work, but
not all of it, and a thread that runs its code cannot be stopped.

grammar_compiler.py runs this file as a script. It reads the grammar from standard input, and writes a JSON list to
standard output: llguidance's reason to refuse the grammar, or "", and the bytes that the grammar takes.
"""

from __future__ import annotations

import json
import random
import resource
import sys
from typing import Any

SECONDS = 2  # of processor time
BYTES = 2**30  # of address space, Python's own included
STEPS = 100  # random bytes to follow through the grammar: its costly part may come after the beginning
MAX_STATES = 2**15  # of the lexer, which keeps every state that it reaches, at 0.1 to 2 kB each


def limits(llguidance: Any) -> Any:
    """The limits that llguidance itself enforces. With them, its messages do not quote the grammar."""
    return llguidance.LLParserLimits(max_lexer_states=MAX_STATES, precompute_large_lexemes=False, verbose_errors=False)


def main() -> None:
    _, path = sys.argv
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    sys.path.insert(0, path)
    import llguidance

    grammar = sys.stdin.read()
    vocabulary = llguidance.LLTokenizer("byte")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    matcher = llguidance.LLMatcher(vocabulary, grammar, log_level=0, limits=limits(llguidance))
    choose = random.Random(0)
    for _ in range(STEPS):
        if matcher.is_stopped():
            break
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [byte for byte in range(256) if bits >> byte & 1]
        if not allowed:
            break
        matcher.consume_token(choose.choice(allowed))
    taken = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(json.dumps([matcher.get_error(), taken]))


if __name__ == "__main__":
    main()
