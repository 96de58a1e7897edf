"""transformers models with our kernels: the same numbers and texts as without them, and the reversal of the patch."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_submodules
from integrations.small_models import IDS, MODELS, PADDED, SIZES, is_patched, make, state
from support.models import in_other_orders
from support.tolerances import assert_as_close_as
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2 import modeling_qwen2

from qwenkern import RequestError
from qwenkern.integrations.transformers import apply_qwenkern, layers, register_attention, revert
from qwenkern.integrations.transformers import patch as integration
from qwenkern.integrations.transformers.patch import PIECES

pytestmark = [
    pytest.mark.filterwarnings("ignore:qwenkern was tested with transformers"),
    pytest.mark.usefixtures("ours_at_any_size"),
]


@pytest.mark.processor
@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", MODELS.values(), ids=MODELS.keys())
def test_logits_are_as_close_to_float64(backend, kind, dtype, mask):
    model = make(kind, dtype)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(IDS, attention_mask=mask).logits
        peers = [each(IDS, attention_mask=mask).logits for each in in_other_orders(model)]
        out = apply_qwenkern(model)(IDS, attention_mask=mask).logits
    rows = torch.ones_like(IDS).bool() if mask is None else mask.bool()  # padded rows have no defined result
    assert_as_close_as(out[rows], [peer[rows] for peer in peers], truth[rows])


@pytest.mark.parametrize("kind", MODELS.values(), ids=MODELS.keys())
def test_other_orders_are_the_same_function(kind):
    """Or what they err by would allow us anything. In float64, where norms stay in float32, as they do in transformers:
    so these, too, differ by roundings, and by no more than a whole run in float32."""
    with torch.no_grad():
        truth, *others = (each(IDS).logits for each in in_other_orders(make(kind).double()))
        peer = make(kind)(IDS).logits
    for other in others:
        assert_as_close_as(other.float(), peer, truth)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"num_beams": 3},
        {"cache_implementation": "static"},
        {"attention_mask": PADDED},
        {"attention_mask": PADDED, "cache_implementation": "static"},
        {"assistant_model": True},
        {"use_cache": False},
    ],
    ids=lambda how: " ".join(how) or "greedy",
)
def test_generation_is_that_of_transformers(backend, how):
    expected, found = (_generate(patched, **how) for patched in (False, True))
    assert torch.equal(found, expected)
    assert len(set(found[0].tolist())) > 5, "a text so dull shows little"


def _generate(patched, attention="sdpa", **how):
    model = make(attention=attention)
    if patched:
        apply_qwenkern(model)
    if how.get("assistant_model"):
        how["assistant_model"] = make()
    ids = IDS[:1] if "assistant_model" in how else IDS
    torch.manual_seed(1)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **settings | how)


@pytest.mark.parametrize("how", [{}, {"attention_mask": PADDED}, {"num_beams": 2}], ids=["greedy", "padded", "beams"])
def test_attention_by_name(backend, how):
    register_attention()
    expected = _generate(False, **how)
    assert torch.equal(_generate(False, attention="qwenkern", **how), expected)
    assert torch.equal(_generate(True, attention="qwenkern", **how), expected)


def test_our_attention_is_what_runs(monkeypatch, backend):
    calls = []
    actual = layers.ops.attention
    monkeypatch.setattr(layers.ops, "attention", lambda *args: calls.append(args[0].shape) or actual(*args))
    model = apply_qwenkern(make())
    with torch.no_grad():
        model(IDS)
        assert len(calls) == (2 if backend == "triton" else 0)
        model(IDS, attention_mask=PADDED)
    assert len(calls) == (2 if backend == "triton" else 0), "a mask is torch's"
    model(IDS).logits.sum().backward()
    assert len(calls) == (2 if backend == "triton" else 0), "so is a gradient"


def test_dropout_and_packed_sequences_are_right(backend):
    model, ids = make(), IDS[:1]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        found = apply_qwenkern(model)(ids, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(found, expected)
        alone = model(ids[:, 4:], use_cache=False).logits
    torch.testing.assert_close(found[:, 4:], alone)
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


REPLACED = {
    "rms_norm": {"norm", "layers.#", "layers.#.input_layernorm", "layers.#.post_attention_layernorm"},
    "rope": {"layers.#.self_attn"},
    "swiglu": {"layers.#.mlp"},
    "attention": {"layers.#.self_attn"},
}


@pytest.mark.parametrize("piece", PIECES)
def test_every_piece_can_be_switched(piece):
    model = apply_qwenkern(make(), **{name: name == piece for name in PIECES}).model
    replaced = [name for name, module in model.named_modules() if isinstance(module, layers.Patched)]
    assert sorted(replaced) == sorted({name.replace("#", layer) for name in REPLACED[piece] for layer in ("0", "1")})


def test_few_tokens_on_a_cpu_are_left_to_transformers(monkeypatch):
    """Where calls of ours cost more than they save, nothing of ours is called."""
    model = make()
    with torch.no_grad():
        expected = model(IDS).logits
    monkeypatch.setattr(layers, "FEW", IDS.numel() * 64 + 1)
    monkeypatch.setattr(layers, "INTERPRETED", False)
    monkeypatch.setattr(layers, "ops", None)
    with torch.no_grad():
        assert torch.equal(apply_qwenkern(model)(IDS).logits, expected)


def test_revert_gives_back_what_was_there():
    model = make()
    before = state(model)
    with torch.no_grad():
        expected = model(IDS).logits
    assert revert(apply_qwenkern(model)) is model
    assert state(model) == before
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    assert revert(model) is model


def test_again_and_with_other_pieces():
    model = make()
    apply_qwenkern(model)
    before = state(model)
    apply_qwenkern(model)
    assert state(model) == before, "nothing was done twice"
    apply_qwenkern(model, rms_norm=False)
    assert type(model.model.norm) is modeling_qwen2.Qwen2RMSNorm
    assert isinstance(model.model.layers[0].mlp, layers.MLP)


def test_other_models_are_left_alone():
    model, other = make(), make()
    clone = copy.deepcopy(apply_qwenkern(model))
    assert not is_patched(other)
    assert Qwen2ForCausalLM.forward.__module__.startswith("transformers")
    revert(model)
    assert is_patched(clone)
    assert not is_patched(revert(clone))


def test_state_hooks_and_saving_are_as_before(tmp_path):
    model = make()
    seen = []
    model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda *args: seen.append(args[2].shape))
    names = list(model.state_dict())
    apply_qwenkern(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    loaded = Qwen2ForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        outputs = model(IDS, output_hidden_states=True)
        torch.testing.assert_close(loaded(IDS).logits, outputs.logits)
    assert seen == [(*IDS.shape, 64)]
    assert len(outputs.hidden_states) == 3
    assert model.double()(IDS).logits.dtype == torch.float64


@pytest.mark.parametrize("attention", ["sdpa", "qwenkern"])
def test_compiles_in_one_graph(attention):
    register_attention()
    model = make(attention=attention)
    with torch.no_grad():
        expected = model(IDS, use_cache=False).logits
        compiled = torch.compile(apply_qwenkern(model), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_follows_the_unpatched(backend, dtype):
    """At each of 16 steps the loss is as close to float64's as that of unpatched transformers in the same dtype."""
    kind = Qwen2ForCausalLM, Qwen2Config(**SIZES | {"num_hidden_layers": 1})

    def losses(model):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        found = []
        for step in range(16):
            ids = torch.randint(3, 23, (2, 8), generator=torch.Generator().manual_seed(step % 4))
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return torch.tensor(found, dtype=torch.float64)

    models = make(kind).double(), make(kind, dtype), apply_qwenkern(make(kind, dtype))
    truth, peer, out = (losses(model) for model in models)
    assert truth[-1] < 0.8 * truth[0], "nothing was learnt"
    assert_as_close_as(out.float(), peer.float(), truth)


def test_gradients_reach_every_parameter(backend):
    model, patched = make(), apply_qwenkern(make())
    for each in (model, patched):
        each(IDS, labels=IDS).loss.backward()
    truth = make().double()
    truth(IDS, labels=IDS).loss.backward()
    for (name, mine), theirs, exact in zip(
        patched.named_parameters(), model.parameters(), truth.parameters(), strict=True
    ):
        assert mine.grad is not None, name
        assert_as_close_as(mine.grad, theirs.grad, exact.grad)


def test_gradient_checkpointing(backend):
    grads = []
    for checkpointing in (False, True):
        model = apply_qwenkern(make()).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


def test_inside_peft(backend):
    """The base model is found, adapters take part, and only they learn."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)

    def adapted():
        torch.manual_seed(3)
        return peft.get_peft_model(make(), config)

    expected, model = adapted(), apply_qwenkern(adapted())
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits)
        assert torch.equal(model.generate(IDS, max_new_tokens=5), expected.generate(IDS, max_new_tokens=5))
    model(IDS, labels=IDS).loss.backward()
    learns = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learns
    assert all("lora_" in name for name in learns)
    assert not is_patched(revert(model))


def test_norms_that_an_adapter_wraps_stay(backend):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["post_attention_layernorm", "norm"])
    model = peft.get_peft_model(make(), config)
    with torch.no_grad():
        expected = model(IDS).logits
        torch.testing.assert_close(apply_qwenkern(model)(IDS).logits, expected)


def test_with_accelerates_hooks(backend):
    """They bring weights to where they are needed: before and after, on top of ours and below."""
    model, expected = make(), make()(IDS).logits
    add_hook_to_module(model.model.layers[0].post_attention_layernorm, AlignDevicesHook(execution_device="cpu"))
    add_hook_to_module(model.model.layers[1].mlp, AlignDevicesHook(execution_device="cpu"))
    torch.testing.assert_close(apply_qwenkern(model)(IDS).logits, expected)
    revert(model)
    torch.testing.assert_close(model(IDS).logits, expected)
    assert isinstance(model.model.layers[1].mlp._hf_hook, AlignDevicesHook)
    apply_qwenkern(model)
    remove_hook_from_submodules(model)
    torch.testing.assert_close(model(IDS).logits, expected)
    assert not is_patched(revert(model))
    mlp = apply_qwenkern(model).model.layers[0].mlp
    add_hook_to_module(mlp, seen := Counts())
    revert(model)
    torch.testing.assert_close(model(IDS).logits, expected)
    assert seen.calls == 1
    remove_hook_from_submodules(model)
    assert mlp.forward.__func__ is type(mlp).forward


class Counts(ModelHook):
    calls = 0

    def pre_forward(self, module, *args, **keywords):
        self.calls += 1
        return args, keywords


def test_norms_that_are_tuned_later(backend):
    config = peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm", "post_attention_layernorm"])
    expected = make()(IDS).logits
    torch.testing.assert_close(peft.get_peft_model(apply_qwenkern(make()), config)(IDS).logits, expected)


def test_a_layer_called_by_hand(backend):
    """By position, with rows that are not contiguous, once as two layers, with other angles for the second call."""
    model, ids = make(), torch.randn(1, 64, 5).transpose(1, 2)
    table = model.model.rotary_emb(ids, torch.arange(5)[None])
    layer = model.model.layers[0]
    with torch.no_grad():
        expected = [layer(ids, None, None, None, False, angles) for angles in (table, (table[0], -table[1]))]
        model.model.layers[1] = layer
        apply_qwenkern(model)
        found = [layer(ids, None, None, None, False, angles) for angles in (table, (table[0], -table[1]))]
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other)
    assert not is_patched(revert(model))


def test_autocast_keeps_its_dtypes():
    model = make()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(IDS).logits
        found = apply_qwenkern(model)(IDS).logits
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_eager_attention_stays(caplog):
    integration._log_once.cache_clear()
    model = make(attention="eager")
    with torch.no_grad():
        expected = model(IDS).logits
        torch.testing.assert_close(apply_qwenkern(model)(IDS).logits, expected)
    assert "attention stays on 'eager'" in caplog.text


def other_kind():
    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=32))


def another_activation():
    config = Qwen2Config(**SIZES)
    config.hidden_act = "gelu"
    return Qwen2ForCausalLM(config)


def another_act_fn():
    model = make()
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    return model


def liger():
    model = make()

    def forward(self, x):
        return x

    forward.__module__ = "liger_kernel.transformers.rms_norm"
    model.model.norm.forward = forward.__get__(model.model.norm)
    return model


def somebody_else():
    model = make()
    model.model.layers[1].mlp.forward = lambda x: x
    return model


def another_attention():
    model = make()

    class Qwen2Attention(type(model.model.layers[0].self_attn)):
        def forward(self, *args, **keywords):
            return super().forward(*args, **keywords)

    model.model.layers[0].self_attn.__class__ = Qwen2Attention
    return model


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda: "qwen", "model is of type str; expected a transformers model"),
        (other_kind, "GPT2LMHeadModel has no decoder layers"),
        (another_activation, "the model's activation is 'gelu'; expected 'silu', or pass swiglu=False"),
        (another_act_fn, "act_fn of Qwen2MLP is a GELU; expected SiLU, or swiglu=False"),
        (liger, r"Qwen2RMSNorm runs on Liger \(liger_kernel"),
        (somebody_else, "forward of Qwen2MLP was replaced already, by .*test_transformers"),
        (another_attention, "forward of Qwen2Attention is that of .*test_transformers; expected transformers' own"),
    ],
    ids=[
        "no model",
        "another kind",
        "another activation",
        "another act_fn",
        "Liger",
        "somebody else",
        "another attention",
    ],
)
def test_bad_models_are_named_and_left_alone(broken, message):
    model = broken()
    before = state(model) if isinstance(model, torch.nn.Module) else None
    with pytest.raises(RequestError, match=message):
        apply_qwenkern(model)
    if before:
        assert state(model) == before


def test_a_patch_on_top_must_go_first():
    model = apply_qwenkern(make())
    model.model.norm.forward = lambda x: x
    with pytest.raises(
        RequestError, match=r"forward of Qwen2RMSNorm was replaced after apply_qwenkern, by .*test_transf"
    ):
        revert(model)


@pytest.mark.parametrize(("version", "error"), [("4.57.1", "expected version 5"), ("6.0.0", "expected version 5")])
def test_other_versions_are_refused(monkeypatch, version, error):
    monkeypatch.setattr("transformers.__version__", version)
    integration._check_version.cache_clear()
    with pytest.raises(ImportError, match=error):
        apply_qwenkern(make())
    integration._check_version.cache_clear()


def test_an_untested_version_is_said(monkeypatch):
    monkeypatch.setattr("transformers.__version__", "5.99.0")
    integration._check_version.cache_clear()
    with pytest.warns(UserWarning, match="tested with transformers 5.17 to 5.22, and this is 5.99.0"):
        integration._check_version()
    integration._check_version.cache_clear()
