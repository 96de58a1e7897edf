"""llama.cpp's mixes of types, such as Q4_K_M: the type of each matrix of a Qwen2 model in such a mix.

The rules are those of `llama_tensor_get_type_impl` and `tensor_type_fallback` in llama.cpp's src/llama-quant.cpp, for a
dense model without an importance matrix. For tied embeddings, one matrix is written, by the rule of the head. (Some
published files of such models have both.) Older versions of llama.cpp sorted the layers by name, as text: then other
layers get the larger type, but the same number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .packing import EMBEDDING, HEAD

Rule = Callable[[int, int], bool]  # (layer, number of layers)


def _every_third(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _first(count: int) -> Rule:
    return lambda layer, layers: layer < count


def _first_part(part: int) -> Rule:
    return lambda layer, layers: layer < layers // part


def _always(layer: int, layers: int) -> bool:
    return True


_LARGER: dict[str, list[tuple[Rule, str]]] = {
    "self_attn.v_proj": [(_every_third, "q6_k")],
    "mlp.down_proj": [(_every_third, "q6_k")],
}
# mix -> the type of most matrices, and rules for other types in some layers; the first rule that applies counts.
MIXES: dict[str, tuple[str, dict[str, list[tuple[Rule, str]]]]] = {
    "q3_k_m": (
        "q3_k",
        {
            "self_attn.v_proj": [(_first(2), "q5_k"), (_always, "q4_k")],
            "self_attn.o_proj": [(_always, "q4_k")],
            "mlp.down_proj": [(_first_part(16), "q5_k"), (_always, "q4_k")],
        },
    ),
    "q4_k_s": ("q4_k", {"self_attn.v_proj": [(_first(4), "q5_k")], "mlp.down_proj": [(_first_part(8), "q5_k")]}),
    "q4_k_m": ("q4_k", _LARGER),
    "q5_k_s": ("q5_k", {}),
    "q5_k_m": ("q5_k", _LARGER),
}
_OF_72B = {"q3_k": "q5_k", "q4_k": "q5_k"}  # of v_proj, in a model of 80 layers with 8 query heads per key-value head
_INSTEAD = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}  # 256 does not divide K


def mixed(mix: str, shapes: Mapping[str, tuple[int, int]], layers: int) -> dict[str, str]:
    """The type of each matrix of these shapes in one of MIXES, by Hugging Face's name."""
    base, rules = MIXES[mix]
    found = {}
    for name, (_, columns) in shapes.items():
        kind = base
        if name == HEAD or (name == EMBEDDING and HEAD not in shapes):
            kind = "q8_0" if columns % 256 else "q6_k"
        elif name != EMBEDDING:
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            kind = next((other for holds, other in rules.get(part, ()) if holds(int(layer), layers)), base)
            if part == "self_attn.v_proj" and layers == 80:
                kind = _OF_72B.get(kind, kind)
        found[name] = _INSTEAD[kind] if kind in _INSTEAD and columns % 256 else kind
    return found
