"""Attention by block: every kind with every option of its own, registers, lists of kinds."""

import itertools
import math
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from flashdit import FlashDiT, config
from flashdit.commands import estimate
from flashdit.memory import count_parameters
from flashdit.models.attention import ATTENTIONS, AttentionShape, describe_attention, make_attention
from flashdit.models.costs import activations, forward_flops, saved_bytes
from flashdit.models.layers import RMSNorm
from flashdit.models.recompute import keep_matmuls
from flashdit.models.weights import start_from
from flashdit.sampling.card import _about
from flashdit.trainer import Trainer
from iwin_core import IwinAttention, kernels
from iwin_core.reference import depthwise_conv_reference

HEADS, DIM = 2, 16
SIZES = {"sample_size": 8, "in_channels": 3, "hidden_size": DIM, "depth": 3, "num_heads": HEADS}


def variants():
    """Returns every attention kind with each choice of its options that are true or false."""
    specs = []
    for name in ATTENTIONS.names():
        switches = [field.name for field in fields(ATTENTIONS[name].options_type) if field.type == "bool"]
        for values in itertools.product((False, True), repeat=len(switches)):
            specs.append({"name": name, **dict(zip(switches, values, strict=True))})
    return specs


VARIANTS = variants()
FULL = [spec for spec in VARIANTS if False not in spec.values()]
"""Every kind with all of its options that are true or false."""
MIXED = [*VARIANTS, {"name": "iwin", "window": 2, "kernel": 5}]
every_variant = pytest.mark.parametrize("spec", VARIANTS, ids=str)
registers_or_none = pytest.mark.parametrize("registers", [0, 3])


def scrambled(module):
    """Returns the module with weights far from zero."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    return module


def tiny(**options):
    torch.manual_seed(0)
    return scrambled(FlashDiT(**{**SIZES, "num_classes": 5, **options})).eval()


def inputs(height=8, width=12, batch=2):
    torch.manual_seed(1)
    return torch.randn(batch, 3, height, width), torch.rand(batch), torch.arange(batch)


def layer(spec, norm=None, grid=(8, 8)):
    return scrambled(
        make_attention(spec, 0, AttentionShape(dim=DIM, num_heads=HEADS, grid=grid, qk_norm=norm))
    )


# The reference: tokens of a window and registers one by one, in plain loops over windows, heads and queries.


def windows_of(spec, grid):
    """Returns the lists of places (row, column) of a kind's windows on a map."""
    places = list(itertools.product(*map(range, grid)))
    if spec["name"] == "global":
        return [places]
    window = spec.get("window", 4)
    sides = [min(window, side) for side in grid]
    counts = [math.ceil(side / m) for side, m in zip(grid, sides, strict=True)]
    of = {
        "iwin": lambda place: tuple(i % count for i, count in zip(place, counts, strict=True)),
        "window": lambda place: tuple(i // m for i, m in zip(place, sides, strict=True)),
    }[spec["name"]]
    groups = {}
    for place in places:
        groups.setdefault(of(place), []).append(place)
    return list(groups.values())


def turned(vector, place):
    """Returns a query or key turned by its place, pair by pair as complex numbers."""
    quarter = len(vector) // 4
    pairs = torch.view_as_complex(vector.reshape(-1, 2))
    angles = [place[axis] * 10_000.0 ** (-f / quarter) for axis in (0, 1) for f in range(quarter)]
    turns = torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles], dtype=pairs.dtype)
    return torch.view_as_real(pairs * turns).flatten()


def slow(module, spec, x, registers):
    """Returns the map and the registers by the definition, for one sample x (h, w, c), registers (n, c)."""
    weights = {name: value.detach() for name, value in module.state_dict().items()}
    n, d, (height, width, _) = len(registers), DIM // HEADS, x.shape

    def projected(token, part, head, place):
        rows = slice(part * DIM + head * d, part * DIM + (head + 1) * d)
        vector = weights["qkv.weight"][rows] @ token + weights["qkv.bias"][rows]
        if part < 2 and f"{'qk'[part]}_norm.weight" in weights:
            vector = vector / (vector.square().mean() + 1e-6).sqrt() * weights[f"{'qk'[part]}_norm.weight"]
        if part < 2 and spec["rope"] and place is not None:
            vector = turned(vector, place)
        return vector

    out, gathered = torch.zeros_like(x), []
    for places in windows_of(spec, (height, width)):
        tokens = [(registers[i], None) for i in range(n)] + [(x[place], place) for place in places]
        mixed = torch.zeros(len(tokens), DIM)
        for head in range(HEADS):
            q, k, v = (
                torch.stack([projected(token, part, head, place) for token, place in tokens])
                for part in range(3)
            )
            for i in range(len(tokens)):
                share = torch.stack([q[i] @ key / math.sqrt(d) for key in k]).softmax(0)
                mixed[i, head * d : (head + 1) * d] = share @ v
        given = mixed @ weights["proj.weight"].T + weights["proj.bias"]
        gathered.append(given[:n])
        for place, token in zip(places, given[n:], strict=True):
            out[place] = token
    if "dwconv.depthwise.weight" in weights:
        weight, bias = weights["dwconv.depthwise.weight"], weights["dwconv.depthwise.bias"]
        out = out + depthwise_conv_reference(x[None], weight, bias)[0]
    return out, torch.stack(gathered).mean(0)


@registers_or_none
@pytest.mark.parametrize("norm", [None, RMSNorm])
@pytest.mark.parametrize("grid", [(4, 8), (5, 6), (3, 9)])
@every_variant
def test_every_kind_equals_loops_over_windows_heads_and_queries(spec, grid, norm, registers):
    module, x, own = layer(spec, norm), torch.randn(2, *grid, DIM), torch.randn(2, registers, DIM)
    with torch.no_grad():
        found = module(x, own) if registers else (module(x), torch.zeros(2, 0, DIM))
    for sample in range(2):
        expected = slow(module, spec, x[sample], own[sample])
        for one, other in zip(found, expected, strict=True):
            assert_close(one[sample], other, rtol=1e-4, atol=2e-5)


@registers_or_none
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("kind", ["iwin", "window"])
def test_one_window_over_the_map_without_convolution_is_global_attention(kind, rope, registers):
    one = layer({"name": kind, "window": 8, "kernel": 0, "rope": rope}, RMSNorm)
    everywhere = layer({"name": "global", "rope": rope}, RMSNorm)
    everywhere.load_state_dict(one.state_dict())
    for grid in ((8, 8), (5, 7)):
        given = [torch.randn(2, *grid, DIM)] + ([torch.randn(2, registers, DIM)] if registers else [])
        assert_close(one(*given), everywhere(*given))


def test_tables_of_a_smaller_map_are_those_of_a_larger_ones_corner_and_larger_maps_have_their_own():
    rope = {"name": "window", "window": 4, "kernel": 0, "rope": True}
    small, large = layer(rope, grid=(4, 4)), layer(rope, grid=(16, 16))
    x = torch.randn(1, 9, 12, DIM)
    assert small(x).equal(large(x))


def test_a_padded_window_and_its_registers_are_those_of_a_smaller_map_beside_a_position_bias_too():
    module = scrambled(IwinAttention(DIM, HEADS, 4, None, relative_position=True, interleaved=False))
    x, own = torch.randn(1, 3, 6, DIM), torch.randn(1, 2, DIM)
    parts = [module(part, own) for part in (x[:, :, :4], x[:, :, 4:])]
    attended, registers = module(x, own)
    assert_close(attended, torch.cat([part for part, _ in parts], dim=2))
    assert_close(registers, (parts[0][1] + parts[1][1]) / 2)


@every_variant
def test_registers_have_no_order_and_their_samples_no_neighbours(spec):
    model, order = tiny(attention=spec, registers=3), torch.tensor([2, 0, 1])
    x, t, y = inputs(7, 9)
    v = model(x, t, y)
    assert_close(torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(2)]), v)
    with torch.no_grad():
        model.register_tokens.copy_(model.register_tokens[order])
    assert_close(model(x, t, y), v, rtol=1e-4, atol=1e-4)


def test_registers_carry_what_no_window_does():
    plain = {"name": "window", "window": 4, "kernel": 0}
    for registers, reached in ((0, False), (2, True)):
        model = tiny(attention=plain, registers=registers, depth=2)
        x, t, y = inputs(8, 8, 1)
        x.requires_grad_()
        model(x, t, y)[0, 0, 7, 7].backward()
        assert bool(x.grad[0, :, 0, 0].any()) == reached


def test_without_registers_a_seed_draws_the_same_weights():
    states = []
    for registers in (0, 2):
        torch.manual_seed(3)
        states.append(FlashDiT(**SIZES, registers=registers).state_dict())
    own = states[1].pop("register_tokens")
    assert own.shape == (2, DIM)
    assert 0 < own.abs().max() < 0.2
    assert states[0].keys() == states[1].keys()
    assert all(value.equal(states[1][name]) for name, value in states[0].items())


@registers_or_none
@pytest.mark.parametrize("qk_norm", [False, True])
@every_variant
def test_every_kind_trains_all_of_it_and_computes_blocks_again_alike(spec, qk_norm, registers):
    found = []
    for again in (None, "blocks", keep_matmuls):
        model = tiny(attention=spec, qk_norm=qk_norm, registers=registers)
        if again is not None:
            model.enable_gradient_checkpointing(None if again == "blocks" else again)
        model(*inputs()).square().sum().backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert [name for name, grad in found[0].items() if grad is None or not grad.any()] == []
    for other in found[1:]:
        assert_close(other, found[0], rtol=0, atol=0)


def test_a_list_repeats_over_the_blocks_and_ends_with_them():
    specs = [{"name": "iwin", "window": 2, "kernel": 0}, "global", {"name": "window"}]
    model = FlashDiT(**{**SIZES, "depth": 5}, attention=specs)
    windows = [getattr(block.attn, "window", None) for block in model.blocks]
    assert windows == [(2, 2), None, (4, 4), (2, 2), None]
    assert [block.attn.interleaved for block in model.blocks if hasattr(block.attn, "window")] == [1, 0, 1]
    same = FlashDiT(**SIZES, attention=[{"name": "iwin"}] * 3)
    assert same.state_dict().keys() == FlashDiT(**SIZES).state_dict().keys()


def test_a_list_of_one_kind_is_that_kind():
    x, t, y = inputs()
    assert tiny(attention=["global"]).eval()(x, t, y).equal(tiny(attention={"name": "global"})(x, t, y))


@registers_or_none
def test_a_list_of_all_kinds_saves_and_loads_at_any_size(tmp_path, registers):
    model = tiny(attention=MIXED, depth=len(MIXED) + 1, registers=registers, qk_norm=True)
    model.save_pretrained(tmp_path)
    loaded = FlashDiT.from_pretrained(tmp_path).eval()
    assert loaded.config.attention == MIXED
    for size in ((8, 8), (5, 9), (12, 10)):
        v = model(*inputs(*size))
        assert v.isfinite().all()
        assert loaded(*inputs(*size)).equal(v)


def test_all_kinds_compile_whole():
    model = tiny(attention=FULL, depth=len(FULL), registers=3, qk_norm=True)
    found = torch.compile(model, fullgraph=True, backend="eager")(*inputs())
    assert_close(found, model(*inputs()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's, of a compiled block's inputs
def test_a_step_of_all_kinds_by_compiled_blocks_is_the_same():
    model = tiny(attention=MIXED, depth=len(MIXED), registers=2, qk_norm=True)
    found = []
    for compiled in (False, True):
        if compiled:
            for block in model.blocks:
                block.compile()
        model.zero_grad()
        model(*inputs()).square().mean().backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


COUNTED = [*([spec] for spec in VARIANTS), FULL]


@registers_or_none
@pytest.mark.parametrize("attention", COUNTED, ids=str)
def test_costs_of_every_kind_are_those_that_a_whole_model_has(attention, registers):
    depth = len(attention) + (len(attention) > 1)  # the last round ends early
    options = {**SIZES, "depth": depth, "attention": attention, "registers": registers, "qk_norm": True}
    model = FlashDiT(**options)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert forward_flops(options) == counter.get_total_flops()
    settings = config.RunConfig(model=options)
    counts = count_parameters(settings)
    assert counts.all == sum(p.numel() for p in model.parameters())
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    assert counts.block == max(blocks)
    assert counts.outside == counts.all - sum(blocks)
    if registers:
        saved = activations(options, low_precision=False, processor=None)
        assert saved["all kept"].of(4) == saved_bytes(model.train(), 4, False)


def test_registers_cost_what_the_formula_says():
    n, tokens, m, width = 5, 64, 16, DIM
    base = {**SIZES, "depth": 2, "attention": {"name": "iwin", "kernel": 0}}
    added = forward_flops({**base, "registers": n}) - forward_flops(base)
    hidden = int(2 / 3 * 4 * width)
    linears = 4 * width**2 + 3 * width * hidden  # q, k, v, output; SwiGLU
    pairs = tokens / m * ((m + n) ** 2 - m**2)
    assert added == 2 * 2 * (n * linears + 2 * pairs * width)


@pytest.mark.parametrize(
    ("attention", "depth", "words"),
    [
        ({"name": "iwin", "window": 4}, 28, "iwin (window 4)"),
        ("global", 28, "global"),
        (
            [{"name": "iwin", "window": 4}] * 3 + ["global"],
            28,
            "3 × iwin (window 4), global; 7 times over 28",
        ),
        (["iwin", "global"], 3, "iwin, global; 1.5 times over 3 blocks"),
    ],
)
def test_attention_is_described_in_words(attention, depth, words):
    assert describe_attention(attention, depth).startswith(words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attention": ["iwin", {"name": "window", "windw": 2}]},
            r"^attention\[1\]: unknown option .* 'windw'",
        ),
        (
            {"attention": ["iwin", {"name": "iwin", "window": 9}]},
            r"^attention\[1\]: window must be .* window=9",
        ),
        ({"attention": ["iwin", 3]}, r"^attention\[1\]: attention must be a name or a mapping .* got 3"),
        ({"attention": []}, r"attention as a list must have an entry, .* got 0 for depth=3"),
        ({"attention": ["iwin"] * 4}, r"no more entries than there are blocks, got 4 for depth=3"),
        ({"registers": -1}, r"registers must be at least 0, got registers=-1"),
        (
            {"attention": {"name": "iwin", "rope": True}, "hidden_size": 12},
            "head width that 4 divides, got 6",
        ),
    ],
)
def test_what_cannot_be_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": {"name": "iwin", "rope": True}}, "without rotary positions, got rope=True"),
        ({"registers": 2}, "without registers, got registers=2"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_where_they_are_demanded(monkeypatch, options, message):
    model = tiny(**options)
    expected = model(*inputs())
    monkeypatch.setattr("iwin_core.kernels.dispatch.device_runs_kernels", lambda kind, index: True)
    before = kernels.set_backend("triton")
    try:
        with pytest.raises(ValueError, match=f"kernel backend 'triton' takes attention {message}"):
            model(*inputs())
        kernels.set_backend("auto")
        assert model(*inputs()).equal(expected)
    finally:
        kernels.set_backend(before)


LISTED = [
    "model.attention=[{name: iwin, window: 2, rope: true}, global]",
    "model.registers=3",
    "model.depth=2",
]


def test_a_run_of_several_kinds_goes_on_as_one_without_a_pause(tiny_overrides, tmp_path, caplog):
    runs = {name: [*tiny_overrides, *LISTED, f"run.dir={tmp_path / name}"] for name in ("whole", "parts")}
    Trainer(config.load(None, runs["whole"])).fit()
    with caplog.at_level("INFO"):
        Trainer(config.load(None, [*runs["parts"], "training.steps=2"])).fit()
    assert "attention: iwin (window 2, rope True), global; 1 times over 2 blocks" in caplog.text
    Trainer(config.load(None, runs["parts"])).fit()
    name = "checkpoints/step_00000006/ema/diffusion_pytorch_model.safetensors"
    whole, parts = (load_file(tmp_path / run / name) for run in runs)
    assert "register_tokens" in whole
    assert all(value.equal(parts[key]) for key, value in whole.items())
    for other, message in (
        ("model.attention=[{name: iwin, window: 2}, global]", r"model.attention is .* not .*'rope': False"),
        ("model.registers=2", "model.registers is 3, not 2"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(config.load(None, [*runs["parts"], other, "training.steps=8"]))


def test_the_model_card_tells_of_the_kinds_and_the_registers():
    model = tiny(attention=[{"name": "iwin", "window": 2}, "global"], registers=2)
    about = _about(model.config, ["a"], "latents")
    assert "attention: iwin (window 2), global; 1.5 times over 3 blocks, 2 registers; latents" in about


def test_the_estimate_tells_of_the_kinds_and_the_registers(capsys):
    estimate.main(["--config", "flashdit_xl", "model.attention=[iwin,iwin,iwin,global]", "model.registers=4"])
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "attention 3 × iwin, global; 7 times over 28 blocks, 4 registers" in printed
    assert f"parameters {675_284_384 - 7 * 1152 * 10 + 4 * 1152:,}" in printed


def test_lightningdit_warms_up_a_list_and_what_is_new_is_told(caplog):
    source = tiny(attention={"name": "global"}, position_embedding="sincos")
    state = source.state_dict()
    kinds = ["global", {"name": "iwin", "rope": True}]
    model = FlashDiT.from_lightningdit(state, num_heads=HEADS, attention=kinds, registers=2)
    assert (
        "not of these weights: the depthwise convolutions of 1 blocks, which start at zero; "
        "2 registers, since the weights have 0" in caplog.text
    )
    taken = {name for name, value in model.state_dict().items() if name in state and value.equal(state[name])}
    assert taken == state.keys()
    assert not model.blocks[1].attn.dwconv.depthwise.weight.any()
    assert model.register_tokens.any()
    same = FlashDiT.from_lightningdit(state, num_heads=HEADS, attention=["global"] * 3)
    assert same(*inputs()).equal(source(*inputs()))


@pytest.mark.parametrize(
    ("theirs", "ours", "told"),
    [
        (2, 2, []),
        (2, 3, ["3 registers, since the weights have 2"]),
        (0, 3, ["3 registers, since the weights have 0"]),
        (2, 0, ["without their 2 registers, as registers=0 has it"]),
    ],
)
def test_registers_are_taken_where_they_are_as_many_and_told_of_else(tmp_path, theirs, ours, told):
    source, model = tiny(registers=theirs), FlashDiT(**SIZES, num_classes=5, registers=ours)
    source.save_pretrained(tmp_path)
    own = None if model.register_tokens is None else model.register_tokens.detach().clone()
    assert start_from(model, tmp_path) == told
    if ours:
        assert model.register_tokens.equal(source.register_tokens if theirs == ours else own)
