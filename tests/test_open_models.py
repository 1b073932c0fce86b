"""Lesson 28: the checks, and what is too heavy for them.

Oracle: the blocks of the library transformers, with random weights: same answers, same gradients.
"""

import importlib
import warnings

import pytest
import torch
from torch.testing import assert_close

import classroom.hidden.open_models as hidden
import makemoe.checks.open_models as checks
from makemoe.gating import Routing, top_k_gating
from makemoe.open_models import (
    KINDS,
    OPEN_MODELS,
    EmptyExperts,
    GateFirst,
    OpenRouter,
    RouterSettings,
    balance_loss,
    from_transformers,
    gates_then_values,
    open_gating,
    open_layer,
)
from makemoe.sparse_moe import Experts


@pytest.mark.parametrize("those", [checks, hidden], ids=["visible", "hidden"])
def test_checks(those):
    those.check_open_gating(open_gating, RouterSettings)
    those.check_gate_first(GateFirst)
    those.check_balance_loss(balance_loss)
    those.check_gates_then_values(gates_then_values)


# ---- transformers

C = 12
MIXED = dict(hidden_size=C, num_experts_per_tok=3)
BLOCKS = {  # name: module, block, config, settings
    "Mixtral": ("mixtral", "MixtralSparseMoeBlock", "MixtralConfig", dict(num_local_experts=8, intermediate_size=20)),
    "Mixtral, k = 1": ("mixtral", "MixtralSparseMoeBlock", "MixtralConfig",
                       dict(num_local_experts=5, intermediate_size=4, num_experts_per_tok=1)),
    "OLMoE": ("olmoe", "OlmoeSparseMoeBlock", "OlmoeConfig", dict(num_experts=8, intermediate_size=20)),
    "OLMoE, normalised": ("olmoe", "OlmoeSparseMoeBlock", "OlmoeConfig",
                          dict(num_experts=6, intermediate_size=8, norm_topk_prob=True)),
    "Qwen3-MoE": ("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig",
                  dict(num_experts=8, moe_intermediate_size=20, norm_topk_prob=True)),
    "Qwen3-MoE, not normalised": ("qwen3_moe", "Qwen3MoeSparseMoeBlock", "Qwen3MoeConfig",
                                  dict(num_experts=9, moe_intermediate_size=4, num_experts_per_tok=9)),
    "Qwen2-MoE": ("qwen2_moe", "Qwen2MoeSparseMoeBlock", "Qwen2MoeConfig",
                  dict(num_experts=8, moe_intermediate_size=20, shared_expert_intermediate_size=16)),
    "Qwen3-Next": ("qwen3_next", "Qwen3NextSparseMoeBlock", "Qwen3NextConfig",
                   dict(num_experts=8, moe_intermediate_size=20, shared_expert_intermediate_size=16)),
    "DeepSeek-V3": ("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config",
                    dict(n_routed_experts=8, moe_intermediate_size=20, n_group=4, topk_group=2, n_shared_experts=2)),
    "DeepSeek-V3, one group": ("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config",
                               dict(n_routed_experts=6, moe_intermediate_size=8, n_group=1, topk_group=1,
                                    norm_topk_prob=False, routed_scaling_factor=0.5)),
    "GLM-4.5": ("glm4_moe", "Glm4MoeMoE", "Glm4MoeConfig",
                dict(n_routed_experts=8, moe_intermediate_size=20, n_group=1, topk_group=1)),
    "gpt-oss": ("gpt_oss", "GptOssMLP", "GptOssConfig",
                dict(num_local_experts=8, intermediate_size=20, swiglu_limit=1.5)),
    "gpt-oss, hardly clamped": ("gpt_oss", "GptOssMLP", "GptOssConfig", dict(num_local_experts=4, intermediate_size=8)),
    "Llama 4": ("llama4", "Llama4TextMoe", "Llama4TextConfig",
                dict(num_local_experts=8, intermediate_size=20, num_experts_per_tok=2)),
    "Llama 4, k = 1": ("llama4", "Llama4TextMoe", "Llama4TextConfig",
                       dict(num_local_experts=4, intermediate_size=16, num_experts_per_tok=1)),
}  # fmt: skip


def theirs(name, block, config, settings, seed=0):
    "A part of the library transformers with random weights and buffers."
    pytest.importorskip("transformers", reason="pip install .[dev]")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Config = getattr(importlib.import_module(f"transformers.models.{name}.configuration_{name}"), config)
        Block = getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), block)
        config = Config(**MIXED | settings)
        config._experts_implementation = "eager"
        part = Block(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in *part.parameters(), *part.buffers():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    return part


def answer(block, x):
    y = block(x)
    return (y[0] if isinstance(y, tuple) else y).view_as(x)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_same_numbers_and_gradients_as_transformers(name, seed):
    block = theirs(*BLOCKS[name], seed)
    ours, x = from_transformers(block), torch.randn(2, 9, C, requires_grad=True)
    y, routing = ours(x)
    reference = answer(block, x)
    assert_close(y, reference, rtol=0, atol=1e-5)
    direction = torch.randn_like(y)
    ours_in, theirs_in = (
        torch.autograd.grad((out * direction).sum(), x, retain_graph=True)[0] for out in (y, reference)
    )
    assert_close(ours_in, theirs_in, rtol=1e-5, atol=1e-5)
    assert not ours.training and not y.isnan().any() and routing.chosen.shape[:2] == (2, 9)
    inside = ours.experts
    while not hasattr(inside, "down"):
        inside = inside.experts
    (y * direction).sum().backward()
    (reference * direction).sum().backward()
    down = block.experts.down_proj.grad
    turned = KINDS[type(block).__name__] in ("gpt-oss", "Llama 4")
    assert_close(inside.down.grad, down.mT if turned else down, rtol=1e-5, atol=1e-5)
    gate = (block.router if hasattr(block, "router") else block.gate).weight.grad
    assert_close(ours.router.linear.weight.grad, gate, atol=2e-5, rtol=1e-4)


def test_the_copy_is_a_copy_and_keeps_type_and_mode():
    block = theirs(*BLOCKS["DeepSeek-V3"]).double().train()
    ours, x = from_transformers(block), torch.randn(5, C, dtype=torch.float64)
    assert ours.training and ours.experts.shared.up.weight.dtype == torch.float64
    assert_close(ours(x)[0], answer(block, x[None])[0], rtol=0, atol=1e-5)
    before = ours(x)[0]
    block.experts.down_proj.data.zero_()
    assert torch.equal(ours(x)[0], before)


def test_an_unknown_block_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^Linear is not known here, but these are: [^\n]*Llama4TextMoe[^\n]*$"):
        from_transformers(torch.nn.Linear(3, 3))


def test_a_layer_with_empty_experts_is_that_of_longcat_flash():
    settings = dict(expert_ffn_hidden_size=8, n_routed_experts=5, zero_expert_num=3, moe_topk=3,
                    num_experts_per_tok=3, routed_scaling_factor=1.5)  # fmt: skip
    block = theirs("longcat_flash", "LongcatFlashMoE", "LongcatFlashConfig", settings)
    switches = RouterSettings(normalise=False, bias=True, scale=1.5, empty=3)
    ours = open_layer(C, 8, block.router.top_k, 8, switches).eval()
    ours.router.linear.weight.data, ours.router.linear.bias.data = block.router.classifier.weight.data, torch.zeros(8)
    ours.router.bias.copy_(block.router.e_score_correction_bias)
    ours.experts.experts.up.data, ours.experts.experts.down.data = (
        block.experts.gate_up_proj.data[:5],
        block.experts.down_proj.data,
    )
    x = torch.randn(2, 20, C)
    y, routing = ours(x)
    assert routing.load[5:].sum() > 0
    assert_close(y, block(x), rtol=0, atol=1e-5)


def test_the_square_root_of_softplus_is_that_of_deepseek_v4():
    router = theirs("deepseek_v4", "DeepseekV4TopKRouter", "DeepseekV4Config", dict(n_routed_experts=8))
    x = torch.randn(40, C)
    logits, weights, indices = router(x)
    settings = RouterSettings("sqrt_softplus", bias=True, scale=router.routed_scaling_factor)
    routing = open_gating(logits, router.top_k, settings, router.e_score_correction_bias)
    assert_close(routing.gates, torch.zeros_like(logits).scatter(-1, indices, weights), rtol=1e-5, atol=1e-6)


def test_the_balance_loss_of_transformers_pools_layers_and_is_not_divided_by_k():
    pytest.importorskip("transformers", reason="pip install .[dev]")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layers = [top_k_gating(torch.randn(2, 30, 6) + torch.randn(6), 2) for _ in range(3)]
    pooled = Routing(*(torch.cat(fields) for fields in zip(*(vars(layer).values() for layer in layers))))
    they = load_balancing_loss_func(tuple(layer.logits.flatten(0, 1) for layer in layers), 6, 2)
    assert_close(they, 2 * balance_loss([pooled]))
    assert abs(they / 2 - balance_loss(layers)) > 0.05


def test_parameters_of_whole_models_on_no_device():
    pytest.importorskip("transformers", reason="pip install .[dev]")
    from transformers import OlmoeConfig, OlmoeForCausalLM

    with torch.device("meta"):
        total = sum(p.numel() for p in OlmoeForCausalLM(OlmoeConfig(intermediate_size=1024)).parameters())
    assert total == 6_919_161_856  # the lesson counts 6.919 billion


# ---- ours


@pytest.mark.parametrize("name", OPEN_MODELS)
def test_every_model_s_layer_learns_and_is_saved(name):
    layer, x = open_layer(8, 16, 4, 6, OPEN_MODELS[name], n_shared=5), torch.randn(3, 7, 8)
    y, routing = layer(x)
    y.square().mean().backward()
    assert y.shape == x.shape and all(p.grad is not None for p in layer.parameters())
    assert layer.router.linear.weight.grad.any()
    again = open_layer(8, 16, 4, 6, OPEN_MODELS[name], n_shared=5)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x)[0], y)


def test_only_a_router_with_a_bias_moves_it():
    x = torch.randn(200, 8) + torch.randn(8)
    for settings, moves in (RouterSettings("sigmoid", bias=True), True), (RouterSettings("sigmoid"), False):
        router = OpenRouter(8, 6, 2, settings, bias_rate=0.05)
        before = router(x).chosen
        router.after_step()
        assert router.bias.any() and torch.equal(router(x).chosen, before) != moves


def test_float32_under_autocast():
    router, x = OpenRouter(8, 6, 2), torch.randn(50, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = router(x)
    assert torch.equal(low.gates, router(x).gates) and low.gates.dtype == torch.float32


def test_empty_experts_return_their_share_of_the_token():
    experts, x = Experts(4, 6, 5), torch.randn(30, 6)
    routing = top_k_gating(torch.randn(30, 6), 3)
    real = Routing(*(field[:, :4] for field in vars(routing).values()))
    want = experts(x, real) + routing.gates[:, 4:].sum(dim=1, keepdim=True) * x
    assert_close(EmptyExperts(experts, 2)(x, routing), want)


WRONG = [(dict(score="tanh"), "tanh"), (dict(shared="two"), "shared"), (dict(gate_at="end"), "gate_at")]


@pytest.mark.parametrize("wrong, word", WRONG)
def test_settings_that_are_not_known_are_refused_in_one_line(wrong, word):
    with pytest.raises(ValueError, match=rf"^[^\n]*{word}[^\n]*$"):
        RouterSettings(**wrong)
