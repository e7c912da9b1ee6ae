import itertools
import math
import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.testing import assert_close

from flashdit import FlashDiT
from flashdit.models.attention import ATTENTIONS
from flashdit.models.sizes import SIZES

LIGHTNINGDIT = {"attention": {"name": "global", "rope": True}, "position_embedding": "sincos"}
FLASHDIT_PARAMETERS = {
    "B": 130_451_744,
    "L": 458_136_576,
    "XL": 675_284_384,
    "1p0B": 1_029_376_544,
    "1p6B": 1_631_810_128,
}
LIGHTNINGDIT_PARAMETERS = {
    ("B", 1): 130_556_192,
    ("B", 2): 130_556_288,
    ("L", 1): 458_152_960,
    ("XL", 1): 675_256_736,
    ("1p0B", 1): 1_029_401_120,
    ("1p6B", 1): 1_631_767_120,
}
VARIANT_PARAMETERS = {  # of LightningDiT-B/1, dit_params.json
    "qk_norm": ({"qk_norm": True}, 130_557_728),
    "no shift": ({"shift_modulation": False}, 116_381_984),
    "gelu": ({"mlp": "gelu"}, 130_543_904),
    "layernorm": ({"norm": "layernorm"}, 130_536_992),
    "plain DiT": ({"mlp": "gelu", "norm": "layernorm"}, 130_524_704),
}


def count(size, **options):
    with torch.device("meta"):
        model = FlashDiT.from_size(size, **options)
    return sum(parameter.numel() for parameter in model.parameters())


def tiny(**options):
    """Returns a small model in evaluation mode, all of whose weights are far from zero."""
    torch.manual_seed(0)
    given = {
        "sample_size": 8,
        "in_channels": 3,
        "hidden_size": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
    }
    model = FlashDiT(**(given | options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def inputs(height=8, width=12, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, 3, height, width), torch.rand(batch), torch.arange(batch)


@pytest.mark.parametrize("size", FLASHDIT_PARAMETERS)
def test_parameters_equal_the_papers(size):
    assert count(size) == FLASHDIT_PARAMETERS[size]


@pytest.mark.parametrize(("size", "patch_size"), LIGHTNINGDIT_PARAMETERS)
def test_parameters_of_the_baseline_equal_lightningdit(size, patch_size):
    expected = LIGHTNINGDIT_PARAMETERS[size, patch_size]
    assert count(size, patch_size=patch_size, **LIGHTNINGDIT) == expected


@pytest.mark.parametrize("name", VARIANT_PARAMETERS)
def test_parameters_of_the_baselines_variants_equal_lightningdit(name):
    options, expected = VARIANT_PARAMETERS[name]
    assert count("B", **LIGHTNINGDIT, **options) == expected


def test_every_size_builds():
    for size in SIZES:
        assert count(size, patch_size=2) > 0


@pytest.mark.parametrize(("kind", "patch_size"), [*itertools.product(ATTENTIONS.names(), (1, 2))])
def test_velocity_has_the_shape_of_the_latents(kind, patch_size):
    model = tiny(attention={"name": kind}, patch_size=patch_size)
    x, t, y = inputs()
    assert model(x, t, y).shape == x.shape


@pytest.mark.parametrize("kind", ATTENTIONS.names())
def test_every_trainable_parameter_gets_a_gradient(kind):
    model = tiny(attention={"name": kind}, qk_norm=True, position_embedding="sincos").train()
    model(*inputs(8, 8)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


@pytest.mark.parametrize("kind", ATTENTIONS.names())
def test_a_new_model_gives_zero_velocity(kind):
    model = FlashDiT.from_size("nano", in_channels=4, attention={"name": kind})
    assert not model(torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([0, 1])).any()


def test_padding_beside_a_map_that_does_not_divide_reaches_nothing():
    model = tiny(attention={"name": "window", "window": 4, "kernel": 3})
    x, t, y = inputs(8, 9)
    assert torch.isfinite(model(x, t, y)).all()


@pytest.mark.parametrize(
    "options", [{}, LIGHTNINGDIT, {"patch_size": 2, "qk_norm": True, "time_scale": 1000.0}]
)
def test_save_and_load_round_trips_bit_for_bit(tmp_path, options):
    model = tiny(**options)
    model.save_pretrained(tmp_path)
    loaded = FlashDiT.from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == {
        k: v for k, v in model.config.items() if k[0] != "_"
    }
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(value.equal(loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert loaded.eval()(*inputs()).equal(model(*inputs()))


@pytest.mark.parametrize("kind", ATTENTIONS.names())
def test_activation_checkpointing_changes_no_gradient(kind):
    grads = []
    for checkpointing in (False, True):
        model = tiny(attention={"name": kind})
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(*inputs()).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert grads[0].equal(grads[1])


def test_labels_are_dropped_in_training_only():
    model = tiny(class_dropout_prob=1.0)
    x, t, y = inputs()
    null = model(x, t, torch.full_like(y, 5))
    assert not torch.allclose(model(x, t, y), null)
    assert model.train()(x, t, y).equal(null)
    assert model(x, t, y, drop=torch.tensor([False, True]))[1].equal(null[1])
    assert model(x, t, None).equal(null)


def test_label_dropout_follows_its_rate():
    model = tiny(class_dropout_prob=0.25).train()
    seen = []
    model.y_embedder.register_forward_pre_hook(lambda _module, args: seen.append(args[1]))
    x, t, y = inputs(4, 4, batch=4096)
    model(x, t, y.clamp(max=4))
    assert 0.22 < seen[0].float().mean() < 0.28


@pytest.mark.parametrize("kind", ["iwin", "window"])
def test_zero_padding_of_the_convolution_is_the_only_position_signal(kind):
    with_conv = tiny(attention={"name": kind})
    without = tiny(attention={"name": kind, "kernel": 0})
    x, t, y = torch.ones(1, 3, 8, 8), torch.tensor([0.5]), torch.tensor([0])
    assert with_conv(x, t, y).std(dim=(2, 3)).min() > 1e-3
    assert without(x, t, y).std(dim=(2, 3)).max() < 1e-5


def test_forward_keeps_bfloat16():
    model = tiny().to(torch.bfloat16)
    x, t, y = inputs()
    assert model(x.bfloat16(), t, y).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attention": {"name": "iwin", "window": 9}},
            "window must be between 1 and the side .* got window=9",
        ),
        (
            {"attention": {"name": "iwin", "window": 0}},
            "window must be between 1 and the side .* got window=0",
        ),
        ({"attention": {"name": "iwin", "kernel": 2}}, "kernel must be odd"),
        ({"attention": {"name": "iwni"}}, "unknown attention 'iwni'; did you mean 'iwin'"),
        ({"attention": {"name": "iwin", "windw": 4}}, "unknown option of attention 'iwin' 'windw'.*'window'"),
        ({"attention": {"window": 4}}, "attention needs a 'name'"),
        ({"num_heads": 3}, "num_heads must divide hidden_size, got num_heads=3 for hidden_size=16"),
        ({"patch_size": 3}, "patch_size must divide sample_size, got patch_size=3 for sample_size=8"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"class_dropout_prob": 1.5}, "class_dropout_prob must be between 0 and 1"),
        ({"position_embedding": "sin"}, "unknown position_embedding 'sin'"),
        ({"norm": "rms"}, "unknown norm 'rms'; did you mean 'rmsnorm'"),
        ({"mlp": "silu"}, "unknown mlp 'silu'"),
        (
            {"position_embedding": "sincos", "hidden_size": 18, "num_heads": 3},
            "hidden_size must be a multiple of 4",
        ),
        ({"attention": {"name": "global"}, "hidden_size": 12}, "head width that 4 divides, got 6"),
    ],
)
def test_options_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


def test_latents_that_do_not_fit_are_named():
    model = tiny(patch_size=2)
    with pytest.raises(ValueError, match=r"takes latents \(B, 3, H, W\), got \(2, 4, 8, 8\)"):
        model(torch.zeros(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"multiples of the patch size 2, got \(2, 3, 8, 7\)"):
        model(torch.zeros(2, 3, 8, 7), torch.rand(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="unknown size 'XXL'"):
        FlashDiT.from_size("XXL")


@pytest.mark.slow
def test_compiled_block_fuses_all_between_its_matrix_products():
    block, x, cond = tiny(patch_size=2).eval().blocks[0], torch.randn(2, 8, 12, 16), torch.randn(2, 16)
    with torch.no_grad():
        expected = block(x, cond)
        found, [code] = run_and_get_code(torch.compile(block, fullgraph=True), x, cond)
    assert_close(found, expected)
    # SiLU; norm, modulation and windows; the convolution's input; sum, gate, norm, modulation; SwiGLU; gate
    calls = re.findall(r"^ +cpp_fused_\w+\(", code.partition("def call")[2], re.MULTILINE)
    assert 0 < len(calls) <= 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_ratio": float("inf")}, "mlp_ratio must be finite and leave .* got mlp_ratio=inf"),
        ({"time_scale": float("nan")}, "time_scale must be above 0 .* got time_scale=nan"),
        ({"label_init_std": -1.0}, "label_init_std from 0 to 100, got .*label_init_std=-1.0"),
        ({"prediction": "noise"}, r"unknown prediction 'noise' \(known: data, velocity\)"),
    ],
)
def test_numbers_that_make_no_model_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FlashDiT.from_size("nano", **options)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn])
def test_layerwise_casting_stores_another_dtype_and_computes_the_same(storage):
    model = tiny(qk_norm=True, position_embedding="sincos")
    x, t, y = inputs()
    with torch.no_grad():
        expected = model(x, t, y)
        model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
        v = model(x, t, y)
    assert storage in {parameter.dtype for parameter in model.parameters()}
    assert v.dtype == torch.float32
    assert (v - expected).norm() / expected.norm() < 8 * torch.finfo(storage).eps


def test_from_config_makes_the_same_model_of_the_same_seed():
    model = tiny(attention={"name": "window", "window": 2, "kernel": 0}, prediction="data")
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(FlashDiT.from_config(model.config))
    assert dict(made[0].config) == dict(model.config)
    assert all(a.equal(b) for a, b in zip(*(m.state_dict().values() for m in made), strict=True))


def test_variants_and_shards_of_a_saved_model_load(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    model.save_pretrained(tmp_path / "variant", variant="fp16")
    for again in (
        FlashDiT.from_pretrained(tmp_path / "shards"),
        FlashDiT.from_pretrained(tmp_path / "variant", variant="fp16"),
    ):
        assert all(again.state_dict()[name].equal(tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("attention", [{"name": "iwin", "window": 4, "kernel": 3}, LIGHTNINGDIT["attention"]])
def test_linear_layers_begin_by_xaviers_uniform_law_and_gates_and_output_at_zero(attention):
    torch.manual_seed(0)
    model = FlashDiT(hidden_size=96, depth=2, num_heads=4, patch_size=2, num_classes=10, attention=attention)
    model.requires_grad_(False)
    seen = 0
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight
        assert module.bias is None or not module.bias.any()
        if "adaLN_modulation" in name or name == "final_layer.linear":
            assert not weight.any()
        elif name.startswith("t_embedder"):
            assert weight.std() == pytest.approx(0.02, rel=0.05)
        else:
            bound = math.sqrt(6 / sum(weight.shape))
            assert weight.abs().max() == pytest.approx(bound, rel=0.01)
            assert weight.abs().max() <= bound
            assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
            seen += 1
    assert seen == 2 * 4, "qkv, proj and the two of SwiGLU"
    table, patches = model.y_embedder.embedding_table.weight, model.x_embedder.proj.weight.flatten(1)
    assert table.std() == pytest.approx(0.02, rel=0.1)
    assert patches.abs().max() == pytest.approx(math.sqrt(6 / sum(patches.shape)), rel=0.01)


@pytest.mark.parametrize("options", [{}, {"registers": 2, "attention": ["iwin", "global"]}], ids=str)
def test_the_tokens_after_a_block_are_returned_beside_the_velocity(options):
    model = FlashDiT(
        sample_size=8, in_channels=3, hidden_size=16, depth=3, num_heads=2, num_classes=2, **options
    )
    model.eval()
    x, t, y = torch.randn(2, 3, 8, 12), torch.tensor([0.2, 0.7]), torch.tensor([0, 1])
    kept = []
    hook = model.blocks[1].register_forward_hook(lambda *passed: kept.append(passed[-1]))
    with hook:
        v, tokens = model(x, t, y, tokens_after=2)
    assert tokens.shape == (2, 8, 12, 16)
    assert tokens.equal(kept[0][0] if options else kept[0])
    assert v.equal(model(x, t, y))
    for block in (0, 4):
        with pytest.raises(ValueError, match=f"tokens_after must be from 1 to 3, got {block}"):
            model(x, t, y, tokens_after=block)
