import pytest
import yaml

from flashdit import config
from flashdit.shared.settings import SHIPPED_CONFIGS, to_yaml


def test_digits_is_the_default_and_reads_back_from_its_yaml(tmp_path):
    loaded = config.load()
    assert loaded.data == {"name": "digits"}
    (tmp_path / "saved.yaml").write_text(to_yaml(loaded))
    assert config.load(tmp_path / "saved.yaml") == loaded


@pytest.mark.parametrize("path", sorted(SHIPPED_CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path):
    given = yaml.safe_load(path.read_text())
    needs_path = given["data"]["name"] not in ("digits", "glyphs")
    loaded = config.load(path, ["data.path=somewhere"] if needs_path else [])
    assert loaded.run.dir
    opening = path.read_text().splitlines()[:4]
    assert any("flashdit train" in line for line in opening), "a YAML opens with its command"


def test_overrides_win_and_keep_their_types():
    loaded = config.load(None, ["training.steps=7", "optimizer.lr=1e-3", "model.qk_norm=true", "seed=3"])
    assert (loaded.training.steps, loaded.optimizer.lr, loaded.seed) == (7, 1e-3, 3)
    assert loaded.model["qk_norm"] is True


def test_a_part_that_changes_its_name_loses_the_old_options():
    assert config.load(None, ["model.attention.name=global"]).model["attention"] == {"name": "global"}
    kept = config.load(None, ["model.attention.window=2"]).model["attention"]
    assert kept == {"name": "iwin", "window": 2, "kernel": 3}


def test_attention_by_block_is_a_list_on_the_command_line_and_in_yaml(tmp_path):
    listed = config.load(None, ["model.attention=[{name: iwin, window: 2}, {name: global}]"])
    assert listed.model["attention"] == [{"name": "iwin", "window": 2}, {"name": "global"}]
    path = tmp_path / "listed.yaml"
    path.write_text(
        "data: {name: digits}\nrun: {dir: x}\nmodel:\n  depth: 4\n"
        "  attention: [&a {name: iwin}, *a, *a, {name: global}]\n"
    )
    assert config.load(path).model["attention"] == [{"name": "iwin"}] * 3 + [{"name": "global"}]
    assert config.load(path, ["model.attention.name=window"]).model["attention"] == {"name": "window"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.stps=5", r"unknown configuration key 'training.stps'; did you mean 'training.steps'"),
        ("trainig.steps=5", r"unknown configuration key 'trainig'; did you mean 'training'"),
        ("model.dept=5", r"unknown configuration key 'model.dept'; did you mean 'model.depth'"),
        ("data.nme=digits", r"unknown option of data 'digits' 'nme'"),
        ("data.name=digit", r"unknown data 'digit'; did you mean 'digits'"),
        ("data.name=shards", r"data 'shards' needs the option 'path'"),
        ("flow.times.name=uniforn", r"unknown time distribution 'uniforn'; did you mean 'uniform'"),
        ("model.attention.windw=4", r"unknown option of attention 'iwin' 'windw'; did you mean 'window'"),
        ("model.attention=[iwin, {name: iwin, windw: 4}]", r"attention\[1\]: unknown option .* 'windw'"),
        (
            "model.attention=[iwin, globl]",
            r"attention\[1\]: unknown attention 'globl'; did you mean 'global'",
        ),
        ("model.attention=[]", r"^model.attention as a list must have an entry, .* got 0 for depth="),
        ("model.registers=two", r"^model.registers must be a whole number, got 'two'$"),
        ("sampling.sampler=huen", r"unknown sampler 'huen'; did you mean 'heun'"),
        ("training.precision=fp64", r"unknown training.precision 'fp64'"),
        (
            "training.keep_matmuls=true",
            r"keep_matmuls requires gradient_checkpointing and no compile, .* got gradient",
        ),
        ("training.steps=0", r"training.steps must be at least 1, got 0"),
        ("training.steps=many", r"^training.steps must be a whole number, got 'many'$"),
        ("training=5", r"training must be a mapping of keys, got 5"),
        ("training.steps", r"an override must be key=value, got 'training.steps'"),
        ("run.dir=", r"^run.dir must be text, got None$"),
        (
            "data={name: images, path: 2024}",
            r"^option 'path' of .* must be text, got 2024: put it between quotes$",
        ),
        ("data.name=[1]", r"^unknown data '\[1\]'"),
        ("data={name: [1]}", r"^the name of a data must be text, got \[1\]$"),
        ("model.depth=two", r"^model.depth must be a whole number, got 'two'$"),
        ("model.mlp_ratio=big", r"^model.mlp_ratio must be a number, got 'big'$"),
        ("flow.times=3", r"^flow.times must be a mapping of keys, got 3$"),
        ("optimizer.betas=big", r"^optimizer.betas must be \[a number, a number\], got 'big'$"),
        ("training.tf32=maybe", r"^training.tf32 must be true or false, got 'maybe'$"),
        ("optimizer.lr=.inf", r"^optimizer.lr must be finite, got inf$"),
        ("optimizer.weight_decay=.nan", r"^optimizer.weight_decay must be finite, got nan$"),
        ("optimizer.min_lr=-.inf", r"^optimizer.min_lr must be finite, got -inf$"),
        ("optimizer.betas=[0.9,.nan]", r"^optimizer.betas must be finite, got "),
        ("optimizer.betas=[0.9,1.5]", r"^optimizer.betas must be at least 0 and below 1, got \[0.9, 1.5\]"),
        ("optimizer.schedule=steps", r"unknown optimizer.schedule 'steps'; did you mean 'step'"),
        (
            "optimizer.schedule=step",
            r"milestones must be given with .*=step, .* got \[\] with",
        ),
        ("optimizer.warmup_start=2", r"optimizer.warmup_start must be from 0 to 1, got 2"),
        ("optimizer.warmup_steps=-1", r"^optimizer.warmup_steps must not be negative, got -1"),
        ("flow.times.std=.nan", r"^flow.times.std must be finite, got nan$"),
        ("flow.times.mean=.inf", r"^flow.times.mean must be finite, got inf$"),
        ("flow.loss.cosine_weight=.inf", r"^flow.loss.cosine_weight must be finite, got inf$"),
        ("flow.loss.cosine_weight=-1", r"^flow.loss.cosine_weight must not be negative, got -1"),
        ("ema.decay=.nan", r"^ema.decay must be finite, got nan$"),
        ("latents.multiplier=.nan", r"^latents.multiplier must be finite, got nan$"),
        ("latents.multiplier=0", r"^latents.multiplier must not be 0"),
        ("sampling.shift=.nan", r"^sampling.shift must be finite, got nan$"),
        ("flow.prediction=noise", r"^flow: unknown prediction 'noise' \(known: data, velocity\)"),
        (
            "model.prediction=data",
            r"^model.prediction must be what flow.prediction says, .* data and velocity",
        ),
        ("run.dir=''", r"^run.dir must not be empty, got '': null means none$"),
        ("evaluation.every=-1", r"^evaluation.every must not be negative, got -1$"),
        ("training.preview_every=-1", r"^training.preview_every must not be negative, got -1$"),
        ("evaluation.num_images=0", r"^evaluation.num_images must be at least 1, got 0$"),
        ("evaluation.num_images=99999999999999999", r"^evaluation: the labels of num_images=9+ "),
        ("evaluation.metrics=[foo]", r"^evaluation: unknown metric 'foo'"),
        ("evaluation.metrics=[]", r"^evaluation.metrics must name one or more of .*fid.*, got \[\]$"),
        ("evaluation.image_size=0", r"^evaluation.image_size must be from 1 to 8192, got 0$"),
        ("evaluation.image_size=99999", r"^evaluation.image_size must be from 1 to 8192, got 99999$"),
        ("evaluation.labels=even", r"^evaluation: unknown labels 'even'"),
        ("evaluation.reference=''", r"^evaluation.reference must not be empty, got '': null means none$"),
        ("latents.vae=''", r"^latents.vae must not be empty"),
        ("data={name: images, path: ''}", r"^data.path must not be empty, got ''"),
        ("data={name: shards, path: ''}", r"^data.path must not be empty, got ''"),
        ("tracking.project=''", r"^tracking.project must not be empty"),
        ("training.tf32=2", r"^training.tf32 must be true or false, got 2$"),
        (
            "training.cpu_attention=fast",
            r"^unknown training.cpu_attention 'fast' \(known: .*auto.*, fused\)$",
        ),
        ("model.mlp_ratio=0.001", r"^model.mlp_ratio must be finite and leave the MLP one hidden channel"),
        ("model.mlp_ratio=.nan", r"^model.mlp_ratio must be finite and leave the MLP one hidden channel"),
        ("model.in_channels=0", r"^model.in_channels must be at least 1, got in_channels=0$"),
        ("model.depth=0", r"^model.depth must be at least 1 "),
        (
            "model.num_classes=-1",
            r"^model.depth must be .* and num_classes at least 0, got .*num_classes=-1$",
        ),
        ("model.patch_size=0", r"^model.patch_size must divide sample_size, got patch_size=0 "),
        ("model.time_scale=0", r"^model.time_scale must be above 0 and at most 1,000,000 "),
        ("model.label_init_std=1e30", r"^model.time_scale must be .* label_init_std from 0 to 100, got "),
        ("model.class_dropout_prob=1.5", r"^model.class_dropout_prob must be between 0 and 1, got "),
        ("model.num_heads=-1", r"^model.num_heads must divide hidden_size, got num_heads=-1"),
        ("training.steps=9000", r"must not pass optimizer.decay_steps, .* got 9000 and 4200"),
        ("seed=-1", r"seed must be from 0 to below 2\^63, got -1"),
        ("model.depth=two", r"model.depth must be a whole number, got 'two'"),
        ("model.depth=true", r"model.depth must be a whole number, got True"),
        ("model.mlp_ratio=big", r"model.mlp_ratio must be a number, got 'big'"),
        ("model.qk_norm=3", r"model.qk_norm must be true or false, got 3"),
        ("model.attention=3", r"attention must be a name or a mapping with 'name', got 3"),
        ("flow.times.std=wide", r"option 'std' of time distribution 'logit_normal' must be a number, got 'w"),
        ("flow.times.std=0", r"std of logit-normal times must be positive, got 0"),
        ("sampling.cfg_interval=[0.2]", r"sampling.cfg_interval must be \[a number, a number\], got \[0.2\]"),
        ("evaluation.metrics=[fid,3]", r"evaluation.metrics must be a list, each text, got \['fid', 3\]"),
        ("data={name: images, path: x, image_size: 0}", r"data.image_size must be at least 1, got 0"),
    ],
)
def test_configurations_that_cannot_be_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        config.load(None, [override])


HARD_NAMES = [
    *(
        "a #b",
        "017",
        "2024",
        " x ",
        "[x]",
        "true",
        "*x",
        "a: b",
        "a=b",
        "it's",
        "ü",
        "-x",
        "1e3",
        "2024-01-01",
    ),
    *("{a}", '"x" y', "&a", "a,b", "...", "!x", "%x", "@x", "`x", "|", "- a", "? a", "a\nb", "1:30", "0x1f"),
]


@pytest.mark.parametrize("name", HARD_NAMES)
def test_a_path_is_what_stands_after_the_equals_sign_and_comes_back_from_yaml(name, tmp_path):
    given = [
        f"run.dir={name}",
        f"data.path={name}",
        "data.name=images",
        f"weights={name}",
        "latents.vae=null",
    ]
    loaded = config.load(None, given)
    assert (loaded.run.dir, loaded.data["path"], loaded.weights, loaded.latents.vae) == (
        name,
        name,
        name,
        None,
    )
    (tmp_path / "saved.yaml").write_text(to_yaml(loaded))
    assert config.load(tmp_path / "saved.yaml") == loaded
    assert yaml.safe_load(to_yaml(loaded))["data"]["path"] == name


@pytest.mark.parametrize("size", ["in_channels", "sample_size", "num_classes"])
def test_what_no_data_can_mend_is_refused_before_they_are_read(size):
    assert config.load(None, [f"model.{size}=null"]).model[size] is None
    with pytest.raises(ValueError, match=r"^model.num_heads must divide hidden_size"):
        config.load(None, [f"model.{size}=null", "model.num_heads=7"])


def test_null_is_null_where_a_key_may_be_and_its_name_elsewhere():
    loaded = config.load(None, ["weights=null", "run.dir=null", "latents.vae=./null", "tracking.project=3"])
    assert (loaded.weights, loaded.run.dir, loaded.latents.vae) == (None, "null", "./null")
    assert loaded.tracking.project == "3"


def test_files_that_cannot_be_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"--config: .*absent\.yaml does not exist, and is no shipped configuration"
    ):
        config.load(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="must be a mapping of keys, got list"):
        config.load(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"broken.yaml must be YAML"):
        config.load(tmp_path / "broken.yaml")
