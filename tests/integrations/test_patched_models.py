"""Uses of a patched model: interrupt the patching, copy, export, compile, train, convert, share."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import subprocess
import sys
import threading
import types
import weakref

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from integrations.small_models import IDS, PADDED, SIZES, is_patched, make, state
from support.tolerances import assert_as_close_as
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrize
from transformers import Qwen2Config, Qwen2ForCausalLM

from qwenkern import RequestError
from qwenkern.integrations.transformers import apply_qwenkern, layers, register_attention, revert
from qwenkern.integrations.transformers import patch as integration

pytestmark = [
    pytest.mark.filterwarnings("ignore:qwenkern was tested with transformers"),
    pytest.mark.usefixtures("ours_at_any_size"),
]


@torch.no_grad()
def logits(model, ids=IDS):
    return model(ids, use_cache=False).logits


class Stop(BaseException):
    """Ctrl-C, at a line that we choose."""


def stopped_at(count, function, *arguments, **keywords):
    """Calls, and raises at the count-th line that runs in the integration's files: whether it came to that."""
    files, left = {integration.__file__, layers.__file__}, count

    def trace(frame, event, _):
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            left -= 1
            if not left:
                raise Stop
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*arguments, **keywords)
    except Stop:
        return True
    finally:
        sys.settrace(before)
    return False


ATTENTION_AWAY = {"attention": False, "rope": False}


@pytest.mark.parametrize(
    ("before", "change"),
    [
        (lambda model: model, apply_qwenkern),
        (apply_qwenkern, revert),
        (apply_qwenkern, lambda model: apply_qwenkern(model, **ATTENTION_AWAY)),
    ],
    ids=["apply", "revert", "other pieces"],
)
@pytest.mark.parametrize("hooked", [False, True], ids=["", "hooked"])
def test_an_interrupt_at_any_line_leaves_all_or_nothing(before, change, hooked):
    model = make((Qwen2ForCausalLM, Qwen2Config(**SIZES | {"num_hidden_layers": 1})))
    if hooked:
        add_hook_to_module(model.model.layers[0].mlp, ModelHook())
    plain, expected = classes(model), logits(model)
    first = classes(before(model))
    last = classes(change(model))
    revert(model)
    count = 0
    while True:
        before(model)
        count += 1
        if not stopped_at(count, change, model):
            break
        assert classes(model) in (first, last), f"line {count}"
        assert count % 40 or torch.allclose(logits(model), expected)
        change(model)
        assert classes(model) == last
        assert classes(revert(model)) == plain
    assert count > 100
    assert torch.equal(logits(revert(model)), expected)


def classes(model):
    """The class of each module, and the forward that accelerate calls."""
    return {name: (type(each), getattr(vars(each).get("_old_forward"), "__func__", None)) for name, each in
            model.named_modules()}  # fmt: skip


@pytest.mark.parametrize("error", [AttributeError, KeyboardInterrupt, MemoryError])
def test_an_error_among_the_replacements_undoes_them(monkeypatch, error):
    model, calls = make(), []
    before = state(model)
    become = integration._become

    def fails_once(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise error
        become(*arguments)

    monkeypatch.setattr(integration, "_become", fails_once)
    with pytest.raises(error):
        apply_qwenkern(model)
    assert state(model) == before
    monkeypatch.undo()
    assert not is_patched(revert(apply_qwenkern(model)))


def test_a_layer_without_its_parts_is_left_alone():
    model = make()
    del model.model.layers[1].mlp.act_fn
    before = state(model)
    with pytest.raises(AttributeError, match="act_fn"):
        apply_qwenkern(model)
    assert state(model) == before
    assert revert(model) is model


def test_two_threads_patch_one_model():
    model, expected, failed = make(), logits(make()), []

    def work():
        try:
            for _ in range(20):
                apply_qwenkern(model, swiglu=False)
                revert(model)
                apply_qwenkern(model)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    torch.testing.assert_close(logits(model), expected)
    assert not is_patched(revert(model))


def replica(model):
    """As DataParallel makes them, one module after another, with weights that are plain tensors."""
    made = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in made.items():
        for name, child in module.named_children():
            copied._modules[name] = made[child]
        for name, parameter in module._parameters.items():
            setattr(copied, name, None if parameter is None else parameter.detach().clone())
    return made[model]


def saved(model):
    without_kernel_functions(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def pickled(model):
    return pickle.loads(pickle.dumps(without_kernel_functions(model), protocol=0))


def without_kernel_functions(model):
    """Where `kernels` is installed, transformers' attention holds a function that nothing pickles, patched or not."""
    for module in model.modules():
        vars(module).pop("_kernel_funcs", None)
    return model


def copied_shallowly(model):
    """copy.copy of every module, with children and weights of its own."""
    copied = copy.copy(model)
    copied._modules = {name: copied_shallowly(each) for name, each in model._modules.items()}
    copied._parameters = {
        name: each if each is None else torch.nn.Parameter(each.detach().clone())
        for name, each in model._parameters.items()
    }
    return copied


@pytest.mark.parametrize(
    "copier",
    [copy.deepcopy, copied_shallowly, replica, saved, pickled],
    ids=["deepcopy", "copy", "DataParallel's replica", "torch.save", "pickle"],
)
def test_a_copy_computes_with_its_own_weights(backend, copier):
    model, plain = apply_qwenkern(make()), make()
    copied, expected = copier(model), logits(plain)
    for each in (copied, plain):
        for module in each.modules():
            for name in ("weight", "bias"):
                if getattr(module, name, None) is not None:
                    getattr(module, name).data.mul_(0.9)
    torch.testing.assert_close(logits(copied), logits(plain))
    torch.testing.assert_close(logits(model), expected)
    assert {name: type(each) for name, each in copied.named_modules()} == {
        name: type(each) for name, each in model.named_modules()
    }
    assert not is_patched(revert(copied))
    torch.testing.assert_close(logits(copied), logits(plain))
    torch.testing.assert_close(logits(model), expected)
    assert isinstance(model.model.norm, layers.Patched), "the original keeps its patch"


def test_a_copy_under_accelerates_hooks_computes_with_its_own_weights():
    model = apply_qwenkern(make())
    for module in (model.model.norm, model.model.layers[0].mlp):
        add_hook_to_module(module, ModelHook())
    remove_hook_from_submodules(model)
    assert not is_patched(revert(model))
    norm = copy.copy(apply_qwenkern(model).model.norm)
    norm._parameters = {"weight": torch.nn.Parameter(2 * norm.weight.detach())}
    x = torch.randn(3, 64)
    torch.testing.assert_close(norm(x), 2 * model.model.norm(x))


@pytest.mark.slow
def test_in_another_process(tmp_path):
    """A saved model is patched where it is loaded."""
    model = apply_qwenkern(make())
    torch.save(without_kernel_functions(model), tmp_path / "model.pt")
    program = """
import sys, torch
model = torch.load(sys.argv[1], weights_only=False)
print(type(model.model.norm).__mro__[1])
torch.save(model(torch.tensor([[3, 4, 5]])).logits.detach(), sys.argv[2])
"""
    arguments = [sys.executable, "-c", program, tmp_path / "model.pt", tmp_path / "logits.pt"]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "<class 'qwenkern.integrations.transformers.layers.RMSNorm'>\n"
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model, torch.tensor([[3, 4, 5]])))


def test_names_and_kinds_are_those_of_transformers():
    """What chooses modules by class (FSDP, accelerate, adapters, hidden states) finds them."""
    model, plain = apply_qwenkern(make()), make()
    for (name, mine), theirs in zip(model.named_modules(), plain.modules(), strict=True):
        assert isinstance(mine, type(theirs)), name
        for attribute in ("__name__", "__qualname__", "__module__"):
            assert getattr(type(mine), attribute) == getattr(type(theirs), attribute), name
    assert str(model) == str(plain)
    outputs = model(IDS, output_hidden_states=True)
    assert len(outputs.hidden_states) == 3


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("few", [0, 1 << 15], ids=["ours pays", "at some length"])
@torch.no_grad()
def test_exports_with_open_batch_and_length(monkeypatch, strict, few):
    """One graph for every batch and length, on either side of the size from which ours pays."""
    exported(monkeypatch, strict, few, [(2, 9), (3, 7), (2, 40), (16, 50)])


@torch.no_grad()
def test_exports_to_triton(monkeypatch):
    monkeypatch.setenv("QWENKERN_KERNELS", "triton")
    monkeypatch.setattr(layers, "INTERPRETED", True)
    exported(monkeypatch, False, 0, [(3, 4)])


def exported(monkeypatch, strict, few, shapes):
    monkeypatch.setattr(layers, "FEW", few)
    plain, model = make(), apply_qwenkern(make())
    dims = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("length", max=128)}
    program = torch.export.export(Logits(model), (IDS,), dynamic_shapes=(dims,), strict=strict)
    assert "qwenkern.rms_norm" in str(program.graph)
    for shape in shapes:
        ids = torch.randint(3, 211, shape, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(program.module()(ids), logits(plain, ids))
    return str(program.graph)


@pytest.mark.slow
@pytest.mark.parametrize("few", [0, 20 * 64])
def test_compiled_for_open_lengths_it_is_compiled_once(monkeypatch, few):
    monkeypatch.setattr(layers, "FEW", few)
    counts = []
    for model in (make(), apply_qwenkern(make())):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, dynamic=True)
        for shape in [(2, 9), (3, 7), (2, 40), (4, 33), (3, 5)]:
            ids = torch.randint(3, 211, shape, generator=torch.Generator().manual_seed(1))
            torch.testing.assert_close(logits(compiled, ids), logits(make(), ids))
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts[1] <= counts[0]


def test_patching_and_reverting_reach_a_compiled_model(monkeypatch):
    model, calls = make(), []
    actual = layers.ops.layers.angles
    monkeypatch.setattr(layers.ops.layers, "angles", lambda *args: calls.append(args) or actual(*args))
    torch._dynamo.reset()
    compiled, expected = torch.compile(model, backend="eager"), logits(model)
    for change, called in ((lambda model: model, False), (apply_qwenkern, True), (revert, False)):
        change(model)
        calls.clear()
        torch.testing.assert_close(logits(compiled), expected)
        assert bool(calls) == called
    torch._dynamo.reset()


def test_trained_evaluated_converted_and_loaded(backend):
    """A patched and an unpatched model go through the same steps. After each, both are equally close to float64."""
    models = make(), apply_qwenkern(make())

    def both_compute_the_same():
        theirs, ours = (logits(model) for model in models)
        assert_as_close_as(ours, theirs, logits(copy.deepcopy(models[0]).double()))

    for model in models:
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        model.eval()
    trained = {name: value.detach().clone() for name, value in models[0].named_parameters()}
    for (name, ours), theirs in zip(models[1].named_parameters(), models[0].parameters(), strict=True):
        ours.data.copy_(theirs)
        assert not torch.equal(ours, dict(make().named_parameters())[name])
    both_compute_the_same()
    for change in (
        lambda model: model.load_state_dict({name: 1.1 * value for name, value in trained.items()}),
        lambda model: model.load_state_dict({name: value.clone() for name, value in trained.items()}, assign=True),
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.float(),
    ):
        for model in models:
            change(model)
        both_compute_the_same()
    assert not is_patched(revert(models[1]))
    assert torch.equal(*(logits(model) for model in models))


def test_functional_call(backend):
    model = apply_qwenkern(make())
    weights = {name: 0.9 * value.detach() for name, value in model.named_parameters()}
    plain = make()
    plain.load_state_dict(weights)
    out = torch.func.functional_call(model, weights, (IDS,), {"use_cache": False}).logits
    torch.testing.assert_close(out, logits(plain))
    torch.testing.assert_close(logits(model), logits(make()))


def test_hooks_of_torch_from_before_and_after(backend):
    """They see what they see on an unpatched model, and what they change counts."""
    theirs, ours = seen_by_hooks(make(), lambda model: None), seen_by_hooks(make(), apply_qwenkern)
    truth = seen_by_hooks(make().double(), lambda model: None)
    assert sorted(ours) == sorted(theirs)
    for name in truth:
        for mine, peer, exact in zip(ours[name], theirs[name], truth[name], strict=True):
            assert_as_close_as(mine, peer, exact)


def seen_by_hooks(model, patch):
    seen = {}

    def see(name, module, inputs, out):
        seen[name] = [each for each in (*inputs, out) if isinstance(each, torch.Tensor)]

    named = [each for each in model.named_modules() if each[0].count(".") >= 2]
    for at, (name, module) in enumerate(named):
        if at == len(named) // 2:
            patch(model)
        module.register_forward_hook(functools.partial(see, name))
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, out: 2 * out)
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda module, args, keywords: (args, keywords | {"hidden_states": 2 * keywords["hidden_states"]}),
        with_kwargs=True,
    )
    seen["logits"] = [logits(model)]
    return seen


def test_adapters_come_merge_and_go():
    models = make(), apply_qwenkern(make())
    config = {
        "r": 4,
        "target_modules": ["q_proj", "down_proj"],
        "modules_to_save": ["norm"],
        "init_lora_weights": False,
    }
    adapted = []
    for model in models:
        torch.manual_seed(3)
        adapted.append(peft.get_peft_model(model, peft.LoraConfig(**config)))
    for model in adapted:
        model.base_model.model.model.norm.modules_to_save["default"].weight.data.mul_(1.5)
    torch.testing.assert_close(*(logits(model) for model in adapted))
    for model in adapted:
        model.merge_adapter()
    torch.testing.assert_close(*(logits(model) for model in adapted))
    merged = []
    for model in adapted:
        model.unmerge_adapter()
        with model.disable_adapter():
            torch.testing.assert_close(logits(model), logits(make()))
        merged.append(model.merge_and_unload())
    torch.testing.assert_close(*(logits(model) for model in merged))
    assert not is_patched(revert(merged[1]))
    assert torch.equal(*(logits(model) for model in merged))


def test_a_new_model_after_the_name_is_registered(tmp_path):
    register_attention()
    make().save_pretrained(tmp_path)
    model = Qwen2ForCausalLM.from_pretrained(tmp_path, attn_implementation="qwenkern").eval()
    default = Qwen2ForCausalLM.from_pretrained(tmp_path).eval()
    assert default.config._attn_implementation == "sdpa"
    assert not is_patched(default)
    for mask in (None, PADDED):
        with torch.no_grad():
            expected = default(IDS, attention_mask=mask).logits
            torch.testing.assert_close(apply_qwenkern(model)(IDS, attention_mask=mask).logits, expected)


def a_class_on_top(model):
    """As FSDP and torch's parametrizations do it."""
    parametrize.register_parametrization(model.model.norm, "weight", torch.nn.Identity())


def a_forward_on_top(model):
    """As Hugging Face's kernelize and Liger do it."""
    norm = model.model.norm
    norm.forward = types.MethodType(lambda self, x: x, norm)


@pytest.mark.parametrize("put", [a_class_on_top, a_forward_on_top])
def test_what_came_on_top_must_go_first(put):
    model = apply_qwenkern(make())
    put(model)
    before = state(model)
    for change in (revert, lambda model: apply_qwenkern(model, rms_norm=False)):
        with pytest.raises(RequestError, match="forward of Qwen2RMSNorm was replaced after apply_qwenkern, by "):
            change(model)
        assert state(model) == before


def test_one_parametrization_later():
    model, plain = make(), make()
    for each in (apply_qwenkern(model), plain):
        parametrize.register_parametrization(each.model.norm, "weight", Double())
    apply_qwenkern(model)
    torch.testing.assert_close(logits(model), logits(plain))
    parametrize.remove_parametrizations(model.model.norm, "weight", leave_parametrized=False)
    torch.testing.assert_close(logits(model), logits(make()))
    assert not is_patched(revert(model))


class Double(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_angles_that_change_in_place(mode):
    """A caller's own buffers, as around a CUDA graph: written anew before each pass over the layers."""
    model, x = apply_qwenkern(make()), torch.randn(1, 4, 64)
    plain = make()
    with mode():
        buffers = tuple(each.clone() for each in model.model.rotary_emb(x, torch.arange(4)[None]))
        for start in (0, 10):
            table = model.model.rotary_emb(x, torch.arange(start, start + 4)[None])
            for buffer, values in zip(buffers, table, strict=True):
                buffer.copy_(values)
            found, expected = x, x
            for ours, theirs in zip(model.model.layers, plain.model.layers, strict=True):
                found = ours(found, position_embeddings=buffers)
                expected = theirs(expected, position_embeddings=table)
            torch.testing.assert_close(found, expected)


def test_the_table_of_a_pass_is_made_once_and_freed(monkeypatch):
    made = []
    actual = layers.ops.layers.angles

    def angles(*arguments):
        out = actual(*arguments)
        made.append(weakref.ref(out[0]))
        return out

    monkeypatch.setattr(layers.ops.layers, "angles", angles)
    model = apply_qwenkern(make())
    logits(model)
    assert len(made) == 1
    gc.collect()
    assert made[0]() is None
