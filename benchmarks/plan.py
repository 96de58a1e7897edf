"""Prints the predicted time of a decode step of Qwen2.5-3B on an H100, as in docs/gpu.md.

python benchmarks/plan.py                      from results/compiled/sm_90.json
python benchmarks/plan.py --quantize int4      with quantised weights (int4: and an int8 head), beside bfloat16
"""

from typing import Annotated

import typer

from qwenkern.benchmarks.offline.plan import WEIGHTS, load
from qwenkern.benchmarks.tables import planned, planned_quantised
from qwenkern.cli import terminal


def main(
    quantize: Annotated[str, typer.Option(help=f"Of {', '.join(WEIGHTS)}; with commas between them.")] = "",
) -> None:
    """Print the predicted times of a decode step, op by op."""
    forms = [each for each in quantize.split(",") if each]
    if unknown := set(forms) - set(WEIGHTS):
        raise typer.BadParameter(f"{', '.join(unknown)}: not among {', '.join(WEIGHTS)}", param_hint="--quantize")
    print(planned_quantised(load(), forms) if forms else planned(load()))


if __name__ == "__main__":
    terminal.run(terminal.command(main))
