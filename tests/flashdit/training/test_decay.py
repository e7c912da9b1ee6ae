"""Which parameters decay, and that nothing else does."""

import pytest
import torch
from torch import nn
from unequal_task import Unequal, UnequalConfig, make_unequal

from flashdit.training.accelerator import start_run
from flashdit.training.decay import decay_groups, unused_texts
from flashdit.training.loop import TrainingLoop
from flashdit.training.optim import OptimizerOptions
from flashdit.training.options import RunOptions, TrainingOptions
from iwin_core.backbone.dense import make_dense_backbone

DENSE = ["absolute_pos_embed", "relative_position_bias_table", "norm"]
"""What does not decay in the released detection and segmentation configurations."""


def decayed_names(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}


def everything(name, parameter):
    return True


def matrices(name, parameter):
    return parameter.ndim > 1


def test_by_the_dense_recipe_norms_and_tables_alone_do_not_decay():
    options = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "position": "relative"}
    backbone, _ = make_dense_backbone("iwin_tiny_patch4_window7_224", options, drop_path_rate=None)
    model = nn.ModuleDict({"backbone": backbone, "bn": nn.BatchNorm2d(3), "head": nn.Linear(3, 2)})
    groups = decay_groups(model, OptimizerOptions(weight_decay=0.05, no_decay=DENSE), matrices)
    found = decayed_names(model, groups)
    assert {"bn.weight", "bn.bias", "head.bias", "head.weight"} <= found
    others = {name for name, _ in model.named_parameters()} - found
    assert all("norm" in name or "relative_position_bias_table" in name for name in others)
    assert any(name.endswith("relative_position_bias_table") for name in others)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_without_texts_the_tasks_rule_holds_and_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    model[1].weight.requires_grad_(False)
    decayed, others = decay_groups(model, OptimizerOptions(weight_decay=0.1), matrices)
    assert decayed["params"] == [model[0].weight]
    assert others["params"] == [model[0].bias, model[1].bias]
    (whole,) = decay_groups(model, OptimizerOptions(weight_decay=0.1), everything)
    assert whole["params"] == [p for p in model.parameters() if p.requires_grad]
    (whole,) = decay_groups(model, OptimizerOptions(weight_decay=0.1, no_decay=[]), matrices)
    assert len(whole["params"]) == 3


def unequal(folder, no_decay, steps, weight_decay=0.5):
    config = UnequalConfig(run=RunOptions(dir=str(folder)))
    config.training = TrainingOptions(steps=steps, global_batch_size=4)
    config.optimizer = OptimizerOptions(lr=0.01, weight_decay=weight_decay, no_decay=no_decay)
    accelerator = start_run(config, Unequal)
    return TrainingLoop(config, Unequal(), accelerator)


def test_a_run_decays_what_it_should_by_lr_times_decay(tmp_path):
    runs = {}
    for name, texts, decay in (("none", None, 0.0), ("all", None, 0.5), ("part", ["norm", "bias"], 0.5)):
        runs[name] = unequal(tmp_path / name, texts, 1, decay)
        start = {key: value.detach().clone() for key, value in runs[name].model.named_parameters()}
        runs[name].fit()
    plain = dict(runs["none"].model.named_parameters())
    for name, value in runs["part"].model.named_parameters():
        lost = 0.0 if "norm" in name or "bias" in name else 0.01 * 0.5
        torch.testing.assert_close(value, plain[name] - lost * start[name])
        torch.testing.assert_close(runs["all"].model.get_parameter(name), plain[name] - 0.005 * start[name])


def test_a_text_that_no_name_has_is_told_and_another_choice_resumes(tmp_path, caplog):
    caplog.set_level("INFO")
    unequal(tmp_path, ["norm", "nrom"], 2).fit()
    assert caplog.text.count("optimizer.no_decay: no parameter has nrom in its name") == 1
    run = unequal(tmp_path, ["bias"], 4)
    assert "resumed with another optimizer.no_decay: ['bias'], was ['norm', 'nrom']" in caplog.text
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.5, 0.0]
    moments = run.optimizer.optimizer.state[run.model.conv.weight]
    assert moments["step"] == 2
    run.fit()
    assert unused_texts(run.model, None) == unused_texts(run.model, ["conv"]) == ""


def test_a_run_without_rules_has_one_group_as_before(tmp_path):
    run = make_unequal(tmp_path)
    (group,) = run.optimizer.param_groups
    assert group["params"] == list(run.model.parameters())


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.no_decay must be texts that are not empty, got \[''\]"):
        OptimizerOptions(no_decay=[""])
