import pytest
import torch
from golden_rule import (
    assert_golden,
    assert_summary,
    golden_input,
    golden_state,
    golden_tensor,
    load_json,
    load_npz,
)

from flashdit import FlashDiT
from flashdit.models.embed import sincos_table, timestep_embedding
from flashdit.models.layers import RMSNorm, make_norm
from iwin_core.rotary import rope_tables, rotate

GOLDEN = load_npz("dit_small.npz")
META = load_json("dit_small_meta.json")["best"]
TABLES = load_npz("dit_small_tables.npz")
TRANSPORT = load_json("transport_meta.json")["loss/dit_small_best"]


def golden_model(**overrides):
    return FlashDiT.from_lightningdit(golden_state(META["keys"]), num_heads=4, **overrides)


@pytest.fixture(scope="module")
def outputs():
    """Returns the golden model's output, input gradient, parameter gradients and inner outputs."""
    model, inner = golden_model(), {}
    for name, module in {
        "x_emb": model.x_embedder,
        "t_emb": model.t_embedder,
        "y_emb": model.y_embedder,
        "block0_attn": model.blocks[0].attn,
        "block0_mlp": model.blocks[0].mlp,
        **{f"block{i}": block for i, block in enumerate(model.blocks)},
    }.items():
        module.register_forward_hook(lambda _module, _args, out, name=name: inner.update({name: out}))
    x = golden_input(1, (2, 32, 16, 16)).requires_grad_()
    out = model(x, torch.tensor([0.25, 0.9]), torch.tensor([3, 10]))
    loss = (out * golden_input(2, out.shape)).sum()
    loss.backward()
    return out, x.grad, model, inner, loss


def test_output_equals_the_released_model(outputs):
    assert_golden(outputs[0], GOLDEN["best/out"])


@pytest.mark.parametrize("name", ["block0", "block1", "block2", "block0_attn", "block0_mlp", "x_emb"])
def test_inner_outputs_equal_the_released_model(outputs, name):
    assert_summary(outputs[3][name].flatten(1, 2), GOLDEN, f"best/{name}")


@pytest.mark.parametrize("name", ["t_emb", "y_emb"])
def test_conditions_equal_the_released_model(outputs, name):
    assert_golden(outputs[3][name], GOLDEN[f"best/{name}"])


def test_gradients_equal_the_released_model(outputs):
    _, grad_x, model, _, loss = outputs
    assert abs(loss.item() / META["grad_loss"] - 1) < 2e-5
    assert_summary(grad_x, GOLDEN, "best/grad_x")
    parameters = dict(model.named_parameters())
    for key, expected in META["param_grad_l2"].items():
        assert abs(float(parameters[key].grad.double().norm()) / expected - 1) < 2e-5, key


def test_tables_equal_the_released_ones():
    assert_golden(sincos_table((16, 16), 96), TABLES["pos_embed"])
    cos, sin = rope_tables((16, 16), 24)
    assert_golden(cos, TABLES["rope_cos"])
    assert_golden(sin, TABLES["rope_sin"])
    tokens = [0, 1, 16, 17]
    rows = torch.from_numpy(TABLES["rope_in_first_token_rows(head0,tokens 0,1,16,17)"])
    rotated = rotate(rows, cos[tokens], sin[tokens])
    assert_golden(rotated, TABLES["rope_out_rows(head0,tokens 0,1,16,17)"])
    times = torch.tensor([0, 0.05, 0.25, 0.9, 1])
    assert_golden(timestep_embedding(times), TABLES["timestep_embedding_t(0,.05,.25,.9,1)_dim256"])


def test_norms_equal_the_released_ones_on_tiny_inputs():
    tiny = torch.from_numpy(TABLES["rmsnorm_tiny_in"])
    norm = RMSNorm(24)
    norm.load_state_dict({"weight": golden_tensor("q_norm.weight", (24,))})
    assert_golden(norm(tiny), TABLES["rmsnorm_tiny_out"])
    assert_golden(make_norm("layernorm", 24)(tiny), TABLES["layernorm_eps1e-6_tiny_out"])


def test_one_window_without_conv_is_lightningdit_where_positions_are_off():
    shared = {"position_embedding": "none"}
    x, t, y = golden_input(1, (2, 32, 16, 16)), torch.tensor([0.25, 0.9]), torch.tensor([3, 10])
    everywhere = golden_model(attention={"name": "global", "rope": False}, **shared)
    one_window = golden_model(attention={"name": "iwin", "window": 16, "kernel": 0}, **shared)
    torch.testing.assert_close(one_window(x, t, y), everywhere(x, t, y))


def test_wrapped_and_prefixed_checkpoints_load(tmp_path):
    state = golden_state(META["keys"])
    torch.save(
        {"model": {}, "ema": {f"module._orig_mod.{k}": v for k, v in state.items()}}, tmp_path / "w.pt"
    )
    model = FlashDiT.from_lightningdit(tmp_path / "w.pt", num_heads=4)
    assert model.blocks[2].attn.qkv.weight.equal(state["blocks.2.attn.qkv.weight"])


def test_official_keys_of_b1_fit_and_show_its_configuration():
    case = load_json("dit_keys_B1.json")
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in case["keys"].items()}
        model = FlashDiT.from_lightningdit(state)
    config = case["config"]
    assert (model.config.depth, model.config.hidden_size) == (config["depth"], config["hidden_size"])
    assert (model.config.num_heads, model.config.sample_size) == (config["num_heads"], config["input_size"])
    assert model.config.attention == {"name": "global", "rope": True}


def test_new_convolutions_of_a_warm_start_are_zero():
    model = golden_model(attention={"name": "iwin"}, position_embedding="none")
    assert not model.blocks[0].attn.dwconv.depthwise.weight.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("final_layer.linear.bias"), "they lack final_layer.linear.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "they have besides extra"),
        (lambda s: s.pop("x_embedder.proj.weight"), "no LightningDiT state dict: it lacks x_embedder"),
        (
            lambda s: s.update({"final_layer.linear.bias": torch.zeros(3)}),
            "shapes that the configuration gives, not so final_layer.linear.bias",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    state = golden_state(META["keys"])
    change(state)
    with pytest.raises(ValueError, match=message):
        FlashDiT.from_lightningdit(state, num_heads=4)


def test_the_size_of_a_model_of_patches_is_read_off_its_position_table():
    source = FlashDiT(
        **{"sample_size": 12, "patch_size": 2, "in_channels": 3, "hidden_size": 16, "depth": 1},
        **{"num_heads": 2, "num_classes": 5, "attention": {"name": "global", "rope": False}},
        position_embedding="sincos",
    )
    model = FlashDiT.from_lightningdit(source.state_dict(), num_heads=2)
    read = {key: model.config[key] for key in ("sample_size", "patch_size", "num_classes", "depth")}
    assert read == {"sample_size": 12, "patch_size": 2, "num_classes": 5, "depth": 1}
    assert model.pos_embed.equal(source.pos_embed)


def test_head_count_that_weights_do_not_show_is_asked_for(tmp_path):
    with pytest.raises(
        ValueError, match=r"num_heads must be given: .* no known size has hidden_size=.* and depth="
    ):
        FlashDiT.from_lightningdit(golden_state(META["keys"]))
    with pytest.raises(ValueError, match="must be a file"):
        FlashDiT.from_lightningdit(tmp_path / "absent.pt")
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="weights_only"):
        FlashDiT.from_lightningdit(tmp_path / "broken.pt")


@pytest.mark.parametrize(
    ("mlp", "mlp_ratio"), [("swiglu", 2.0), ("gelu", 2.5), ("swiglu", 8 / 3), ("gelu", 0.3)]
)
def test_the_width_of_the_mlp_is_read_off_its_tensors(mlp, mlp_ratio):
    options = {"sample_size": 4, "in_channels": 3, "hidden_size": 40, "depth": 1, "num_classes": 5}
    attention = {"name": "global", "rope": False}
    source = FlashDiT(**options, num_heads=2, mlp=mlp, mlp_ratio=mlp_ratio, attention=attention)
    model = FlashDiT.from_lightningdit(source.state_dict(), num_heads=2, position_embedding="none")
    for name, tensor in source.state_dict().items():
        assert model.state_dict()[name].equal(tensor)
    if mlp_ratio * 4 % 1 == 0:
        assert model.config.mlp_ratio == mlp_ratio
