"""Reads and checks the quantization_config of a config.json.

A checkpoint of a kind that qwenkern does not read is refused here, before its weights are downloaded. This file imports
the standard library only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import CheckpointError, shown

SUPPORTED = (
    "GPTQ with 4 or 8 bits, AWQ (gemm) with 4 bits, compressed-tensors with 4- or 8-bit integers or fp8, and "
    "checkpoints that qwenkern wrote"
)
_INSTEAD = "use the model that this one was made from, or a GGUF file of it"
FIELDS = ("quantization_config", "compression_config", "quantization")  # the last two: early compressed-tensors, MLX
LARGEST_GROUP = 1 << 24  # values; no row is longer
VERSION = 1  # of qwenkern's own checkpoints


@dataclass(frozen=True)
class Quantization:
    """How the quantised matrices of a checkpoint are stored.

    method: "gptq", "awq", "compressed-tensors" or "qwenkern", which has ``formats`` and none of the other fields.
    storage: gptq: "gptq" (zero points are stored minus 1) or "gptq_v2"; awq: "gemm"; compressed-tensors: its format.
    kind: of a code: "int" or "float" (e4m3).
    group_size: values along a row that share a scale; ROW: a whole row; MATRIX: the whole matrix.
    symmetric: whether all zero points are the middle of the codes; None if the configuration does not say.
    carries: whether 1 was subtracted from zero points in whole words, as in GPTQModel, so that 0 borrows from the next.
    ignore: modules that are not quantised, by name. (Regular expressions of a downloaded file are not evaluated.)
    formats: of each quantised matrix, by its module's name.
    notes: what the configuration asks for that qwenkern does not do."""

    method: str
    storage: str = ""
    bits: int = 8
    kind: str = "int"
    group_size: int = -1
    symmetric: bool | None = None
    carries: bool = False
    ignore: tuple[str, ...] = ()
    formats: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def ignores(self, module: str) -> bool:
        """Whether the configuration says that this module is not quantised."""
        return any(each == module or (self.method == "awq" and each in module) for each in self.ignore)

    def __str__(self) -> str:
        if self.method == "qwenkern":
            return "qwenkern"
        groups = {ROW: "per row", MATRIX: "per matrix"}.get(self.group_size, f"groups of {self.group_size}")
        return f"{self.method}, {self.kind} of {self.bits} bits, {groups}"


ROW, MATRIX = -1, 0


def quantization(fields: Mapping[str, Any], source: str) -> Quantization | None:
    """The quantisation of a config.json with these fields; None if it has none. ``source`` names it in messages.

    Raises CheckpointError for one that qwenkern does not read."""
    for name in FIELDS:
        found = fields.get(name)
        if found in (None, {}):
            continue
        config = _Config(found, f"{source}: {name}")
        method = config.fields.get("quant_method") or _guessed(config.fields)
        known = method.lower() if isinstance(method, str) else ""
        if known not in _READERS:
            raise config.refused(f"says that the weights are quantised by {shown(method)}", SUPPORTED)
        return _READERS[known](config)
    return None


def _guessed(fields: Mapping[str, Any]) -> str | None:
    """The quantisation method of a configuration that has no quant_method."""
    if fields.get("load_in_4bit") or fields.get("load_in_8bit"):
        return "bitsandbytes"
    if "config_groups" in fields:
        return "compressed-tensors"
    return "MLX" if "group_size" in fields else None


class _Config:
    """The fields of a quantization_config, or of an object in one, and its name in messages."""

    def __init__(self, fields: Any, where: str) -> None:
        if not isinstance(fields, Mapping):
            raise CheckpointError(f"{where} is {shown(fields)}; expected an object")
        self.fields, self.where = fields, where

    def refused(self, found: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.where} {found}, which is not supported; expected {expected}: {_INSTEAD}")

    def one_of(self, name: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        """A field with one of these values, text in any case; ``default`` if it is missing or null."""
        found = default if self.fields.get(name) is None else self.fields[name]
        value = found.lower() if isinstance(found, str) else found
        for each in allowed:
            if value == each and isinstance(value, bool) == isinstance(each, bool):
                return each
        raise self.refused(f"has {name} {shown(found)}", " or ".join(map(repr, allowed)))

    def group_size(self, name: str = "group_size") -> int:
        found = self.fields.get(name)
        if type(found) is not int or not (found == ROW or 1 <= found <= LARGEST_GROUP):
            raise self.refused(f"has {name} {shown(found)}", "a positive number of values, or -1 for a whole row")
        return found

    def names(self, name: str) -> tuple[str, ...]:
        found = self.fields.get(name) or []
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise CheckpointError(f"{self.where} has {name} {shown(found)}; expected a list of names")
        return tuple(found)

    def inner(self, name: str) -> _Config:
        return _Config(self.fields.get(name), f"{self.where}.{name}")


def _gptq(config: _Config) -> Quantization:
    """Fields: QuantizeConfig of AutoGPTQ and GPTQModel."""
    fields = config.fields
    if fields.get("is_marlin_format"):
        raise config.refused("has is_marlin_format true", "weights in the layout of GPTQ")
    storage = config.one_of("checkpoint_format" if fields.get("checkpoint_format") else "format", _GPTQ, "gptq")
    config.one_of("pack_dtype", ("int32",), "int32")
    overrides = config.inner("dynamic").fields if fields.get("dynamic") else {}
    if mixed := [each for each, of_module in overrides.items() if not each.startswith("-:") and of_module]:
        raise config.refused(f"has other settings for some modules in dynamic: {shown(mixed[0])}", "one for all")
    meta = fields.get("meta")
    writers = meta.get("quantizer", []) if isinstance(meta, Mapping) else []
    return Quantization(
        method="gptq",
        storage=storage,
        bits=config.one_of("bits", (4, 8)),
        group_size=config.group_size(),
        symmetric=fields.get("sym") if isinstance(fields.get("sym"), bool) else None,
        carries=storage == "gptq" and any("gptqmodel" in str(each).lower() for each in _listed(writers)),
    )


_GPTQ = ("gptq", "gptq_v2")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _awq(config: _Config) -> Quantization:
    """Fields: AwqConfig of AutoAWQ and transformers."""
    fields = config.fields
    if str(fields.get("backend")).lower() == "llm-awq":
        raise config.refused("has backend 'llm-awq'", "weights in the gemm layout of AutoAWQ")
    layout = next((each for each in ("version", "checkpoint_format", "format") if fields.get(each)), "version")
    config.one_of("zero_point", (True,), True)
    return Quantization(
        method="awq",
        storage=config.one_of(layout, ("gemm",), "gemm"),
        bits=config.one_of("w_bit" if "w_bit" in fields else "bits", (4,)),
        group_size=config.group_size("q_group_size" if "q_group_size" in fields else "group_size"),
        ignore=config.names("modules_to_not_convert"),
    )


def _compressed_tensors(config: _Config) -> Quantization:
    """Fields: QuantizationConfig and QuantizationArgs of the library compressed-tensors."""
    fields = config.fields
    config.one_of("quantization_status", ("compressed",), "compressed")
    if (sparsity := fields.get("sparsity_config")) not in (None, {}):
        _Config(sparsity, f"{config.where}.sparsity_config").one_of("format", ("dense",), "dense")
    groups = config.inner("config_groups").fields
    if not groups:
        raise CheckpointError(f"{config.where}.config_groups is empty; expected one group")
    schemes = [_Config(group, f"{config.where}.config_groups.{name}") for name, group in groups.items()]
    weights = schemes[0].inner("weights")
    for other in schemes[1:]:
        if other.inner("weights").fields != weights.fields:
            raise config.refused(f"has {len(schemes)} config_groups whose weights differ", "one scheme for all")
    kind = weights.one_of("type", ("int", "float"), "int")
    bits = weights.one_of("num_bits", (4, 8) if kind == "int" else (8,), 8)
    weights.one_of("dynamic", (False,), False)
    group_size = weights.fields.get("group_size")
    implied = "tensor" if group_size is None else "channel" if group_size == ROW else "group"
    allowed = ("tensor", "channel", "group") if kind == "int" else ("tensor", "channel")
    strategy = weights.one_of("strategy", allowed, implied)
    where = schemes[0] if schemes[0].fields.get("format") else config
    return Quantization(
        method="compressed-tensors",
        storage=where.one_of("format", _INTEGERS if kind == "int" else _FLOATS),
        bits=bits,
        kind=kind,
        group_size=weights.group_size() if strategy == "group" else ROW if strategy == "channel" else MATRIX,
        symmetric=weights.one_of("symmetric", (True, False) if kind == "int" else (True,), True),
        ignore=config.names("ignore"),
        notes=tuple(_not_done(config, schemes)),
    )


_INTEGERS = ("int-quantized", "pack-quantized", "naive-quantized")
_FLOATS = ("float-quantized", "naive-quantized")


def _not_done(config: _Config, schemes: list[_Config]) -> list[str]:
    """Notes on quantised activations and a quantised cache in the configuration, which qwenkern ignores."""
    notes = []
    for name in ("input_activations", "output_activations"):
        if any(scheme.fields.get(name) for scheme in schemes):
            notes.append(f"{config.where} quantises {name.replace('_', ' ')}; qwenkern does not")
    if config.fields.get("kv_cache_scheme"):
        notes.append(f"{config.where} quantises the key-value cache; its scales are not used")
    return notes


def _own(config: _Config) -> Quantization:
    config.one_of("version", (VERSION,))
    formats = config.inner("formats").fields
    if not formats or not all(isinstance(each, str) for each in formats.values()):
        raise CheckpointError(f"{config.where}.formats is {shown(formats)}; expected the format of each module")
    return Quantization(method="qwenkern", formats=dict(formats))


_READERS = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors, "qwenkern": _own}
