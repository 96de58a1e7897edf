"""Prints what a decode step of Qwen2.5-3B should take on an H100, as docs/performance.md has it.

python benchmarks/plan.py                   from results/compiled/sm_90.json
"""

from qwenkern.benchmarks.offline.plan import load
from qwenkern.benchmarks.tables import planned

if __name__ == "__main__":
    print(planned(load()))
