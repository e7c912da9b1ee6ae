import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashdit import FlashDiT, config
from flashdit.models.weights import same_classes, start_from
from flashdit.trainer import Trainer

LABELS = "y_embedder.embedding_table.weight"
TINY = {"sample_size": 8, "in_channels": 3, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
GLOBAL = {"attention": {"name": "global", "rope": True}, "position_embedding": "sincos"}


def seeded(seed, **options):
    """Returns a tiny model whose every weight is random, so that nothing is zero by initialisation."""
    torch.manual_seed(seed)
    model = FlashDiT(**{**TINY, **options}).eval()
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def velocity(model, size=8, labels=(0, 2)):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, size, size, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([0.2, 0.7]), torch.tensor(labels))


def test_a_model_folder_and_a_file_start_the_same_model(tmp_path):
    source = seeded(0)
    source.save_pretrained(tmp_path / "folder")
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    torch.save({"ema": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "weights.pt")
    for name in ("folder", "weights.safetensors", "weights.pt"):
        model = seeded(1)
        assert start_from(model, tmp_path / name) == []
        assert velocity(model).equal(velocity(source))


def test_classes_without_names_get_a_new_label_table_which_is_told_and_keep_the_null_label(tmp_path):
    source, model = seeded(0), seeded(1, num_classes=5)
    source.save_pretrained(tmp_path)
    fresh = model.state_dict()[LABELS].clone()
    assert start_from(model, tmp_path) == ["the label rows of 5 of 5 classes"]
    table = model.state_dict()[LABELS]
    assert table[:-1].equal(fresh[:-1])
    assert velocity(model, labels=(5, 5)).equal(velocity(source, labels=(3, 3)))


def test_another_resolution_changes_the_window_alone(tmp_path):
    source = seeded(0)
    source.save_pretrained(tmp_path)
    model = seeded(1, sample_size=16, attention={"name": "iwin", "window": 8, "kernel": 3})
    assert start_from(model, tmp_path) == []
    assert model.state_dict().keys() == source.state_dict().keys()
    assert velocity(model, size=16).shape == (2, 3, 16, 16)


def test_global_attention_warms_up_iwin_attention_with_zero_convolutions(tmp_path):
    source, model = seeded(0, **GLOBAL), seeded(1)
    source.save_pretrained(tmp_path)
    assert start_from(model, tmp_path) == [
        "without their position table, as position_embedding=none has it",
        "the depthwise convolutions of 1 blocks, which start at zero",
    ]
    assert not model.state_dict()["blocks.0.attn.dwconv.depthwise.weight"].any()
    for name in ("blocks.0.attn.qkv.weight", "blocks.0.mlp.w12.weight", "blocks.0.adaLN_modulation.1.weight"):
        assert model.state_dict()[name].equal(source.state_dict()[name])


def test_a_position_table_is_computed_for_its_size_and_not_loaded(tmp_path):
    seeded(0, **GLOBAL).save_pretrained(tmp_path)
    model = seeded(1, sample_size=16, **GLOBAL)
    table = model.pos_embed.clone()
    assert start_from(model, tmp_path) == []
    assert model.pos_embed.equal(table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 2}, r"must be of the configured model, they lack blocks\.1\.\S+, \S+, \S+ and \d+ more$"),
        ({"hidden_size": 32}, r"weights must have the shapes that the configuration gives, not so \S+, "),
        ({"qk_norm": True}, r"they lack blocks\.0\.attn\.k_norm\.weight, blocks\.0\.attn\.q_norm\.weight$"),
        ({"in_channels": 4, "patch_size": 2}, r"not so x_embedder\.proj\.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, options, message):
    seeded(0).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        start_from(seeded(1, **options), tmp_path)


def test_no_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"weights must be a run, .* got .*absent"):
        start_from(seeded(0), tmp_path / "absent")
    with pytest.raises(ValueError, match=r"weights must be a run or a folder"):
        start_from(seeded(0), tmp_path)


def test_a_run_starts_from_another_once_and_says_what_is_new(tiny_overrides, tiny_shards, tmp_path, caplog):
    Trainer(config.load(None, [*tiny_overrides, f"run.dir={tmp_path / 'first'}"])).fit()
    (tiny_shards / "class_names.json").write_text(json.dumps(["a", "b", "c", "d"]))
    more = [*tiny_overrides, f"weights={tmp_path / 'first'}", "model.num_classes=4", "training.steps=2"]
    with caplog.at_level("INFO"):
        trainer = Trainer(config.load(None, more))
    assert f"starts from {tmp_path / 'first'}; new: the label rows of 4 of 4 classes" in caplog.text
    average = load_file(tmp_path / "first/checkpoints/step_00000006/ema/diffusion_pytorch_model.safetensors")
    started = trainer.model.state_dict()
    assert [name for name in started if name != LABELS and not started[name].equal(average[name])] == []
    trainer.fit()
    shutil.rmtree(tmp_path / "first")
    again = Trainer(config.load(None, [*more, "training.steps=4"]))
    assert again.step == 2, "the run itself goes on; its start is not taken again"


@pytest.mark.parametrize("option", [{"num_heads": 4}, {"time_scale": 1000.0}, {"prediction": "data"}])
def test_options_that_no_shape_shows_must_be_the_same(tmp_path, option):
    seeded(0, **option).save_pretrained(tmp_path / "folder")
    (key, value), *_ = option.items()
    with pytest.raises(ValueError, match=f"options they were trained with, .* got {key}=.* for {value}"):
        start_from(seeded(1), tmp_path / "folder")


def test_positions_that_are_left_out_are_told_of(tmp_path):
    seeded(0, **GLOBAL).save_pretrained(tmp_path / "folder")
    told = start_from(seeded(1), tmp_path / "folder")
    assert "without their position table, as position_embedding=none has it" in told


def test_weights_of_before_predictions_were_named_are_of_the_velocity(tmp_path):
    seeded(0).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["prediction"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert start_from(seeded(1), tmp_path) == []
    assert velocity(FlashDiT.from_pretrained(tmp_path)).equal(velocity(seeded(0)))
    with pytest.raises(ValueError, match="got prediction=data for velocity"):
        start_from(seeded(1, prediction="data"), tmp_path)


def test_tables_of_rotations_in_a_released_file_are_computed_and_not_loaded(tmp_path):
    source = seeded(0, **GLOBAL)
    tables = {f"feat_rope.freqs_{name}": torch.randn(64, 8) for name in ("cos", "sin")}
    save_file(source.state_dict() | tables, tmp_path / "released.safetensors")
    model = seeded(1, **GLOBAL)
    assert start_from(model, tmp_path / "released.safetensors") == []
    assert velocity(model).equal(velocity(source))


def test_iwin_attention_becomes_global_without_its_convolutions(tmp_path):
    source, model = seeded(0, depth=2), seeded(1, depth=2, **GLOBAL)
    source.save_pretrained(tmp_path)
    table = model.pos_embed.clone()
    told = start_from(model, tmp_path)
    assert told == ["without the depthwise convolutions of 2 blocks, which the model does not have"]
    assert model.pos_embed.equal(table)
    for name in ("blocks.1.attn.qkv.weight", "blocks.1.mlp.w12.weight", "final_layer.linear.weight"):
        assert model.state_dict()[name].equal(source.state_dict()[name])


def test_another_patch_size_keeps_all_but_the_first_and_the_last_layer(tmp_path):
    source, model = seeded(0), seeded(1, patch_size=2)
    source.save_pretrained(tmp_path)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    told = start_from(model, tmp_path)
    assert told == ["the patch embedding and the last layer, since the weights are for another patch size"]
    own = {"x_embedder.proj.weight", "final_layer.linear.weight", "final_layer.linear.bias"}
    for name, tensor in model.state_dict().items():
        assert tensor.equal((fresh if name in own else source.state_dict())[name]), name


@pytest.mark.parametrize(
    ("names", "rows", "told"),
    [
        (["a", "b", "c"], [0, 1, 2], []),
        (["c", "a", "b"], [2, 0, 1], []),
        (["b", "d", "a", "c"], [1, None, 0, 2], ["the label rows of 1 of 4 classes"]),
        (["d", "e", "f"], [None, None, None], ["the label rows of 3 of 3 classes"]),
        (["a", "a"], [0, None], ["the label rows of 1 of 2 classes"]),
    ],
)
def test_classes_that_both_have_keep_their_rows_by_name(tmp_path, names, rows, told):
    source, model = seeded(0), seeded(1, num_classes=len(names))
    source.save_pretrained(tmp_path / "ema")
    state = {"format": 1, "class_names": ["a", "b", "c"]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    fresh, theirs = model.state_dict()[LABELS].clone(), source.state_dict()[LABELS]
    assert start_from(model, tmp_path, names) == told
    expected = [fresh[i] if row is None else theirs[row] for i, row in enumerate(rows)]
    assert model.state_dict()[LABELS].equal(torch.stack([*expected, theirs[-1]]))


def test_classes_of_one_name_keep_their_order():
    assert same_classes(["crane", "x", "crane"], ["y", "crane", "crane"]) == [1, None, 2]
