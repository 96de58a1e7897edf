"""Writes a GGUF file with other block formats, for comparing engines on it: the same model and vocabulary, with every
matrix rounded to one format by the gguf library.

    python benchmarks/requantise.py demo demo-q8_0.gguf --to q8_0
    python benchmarks/requantise.py FILE.gguf OUT.gguf --to q4_0

The values are rounded twice, in the first file and in the second. This does not change the speed, but do not judge the
format's quality by the new file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwenkern.cli import terminal
from qwenkern.errors import CheckpointError
from qwenkern.hub.names import resolve

KINDS = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "bf16", "f16")  # what the gguf library can round to


def requantise(source: Path, out: Path, kind: str) -> None:
    """Copies a GGUF file with all its key-values. Matrices get the type ``kind``, vectors stay as they are. Raises
    CheckpointError if ``out`` exists."""
    import gguf
    from gguf.quants import dequantize, quantize

    if out.exists():
        raise CheckpointError(f"{out}: exists; expected the name of a new file")
    reader = gguf.GGUFReader(source)
    wanted = gguf.GGMLQuantizationType[kind.upper()]
    part = out.with_name(out.name + ".part")
    writer = gguf.GGUFWriter(part, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue  # the writer writes these itself
        kinds = field.types
        inner = kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kinds[0], sub_type=inner)
    for tensor in reader.tensors:
        if len(tensor.shape) == 1:
            writer.add_tensor(tensor.name, tensor.data)
        else:
            values = dequantize(tensor.data, tensor.tensor_type)
            writer.add_tensor(tensor.name, quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.rename(out)


def main(
    source: Annotated[str, typer.Argument(help="A GGUF file, or a name of a model that is one.")],
    out: Annotated[Path, typer.Argument(help="The new file.")],
    to: Annotated[str, typer.Option(help=f"The type of every matrix: {', '.join(KINDS)}.")] = "q8_0",
) -> None:
    """Round the matrices of a GGUF file to another type."""
    if to not in KINDS:
        raise typer.BadParameter(f"{to}: expected one of {', '.join(KINDS)}", param_hint="--to")
    file = resolve(source)
    if file.suffix != ".gguf":
        raise typer.BadParameter(f"{source}: is not a GGUF file", param_hint="SOURCE")
    requantise(file, out, to)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, from {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    terminal.run(terminal.command(main))
