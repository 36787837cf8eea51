"""The figures of a plan, everything that it refuses, and what may change when a run is resumed."""

import json
from pathlib import Path

import pytest

import configs
from configs.errors import UserError
from configs.load import load
from launcher.clusters import resolve
from launcher.plan import Plan, differences, make_plan

RECIPES = sorted(Path(configs.__file__).parent.glob("[qr]*.yaml"))


def test_quickstart_on_four_devices(planned, tmp_path):
    plan = planned()
    assert (plan.cluster, plan.backend, plan.platform) == ("local-2x2", "local", "cpu")
    assert (plan.processes, plan.devices, plan.devices_per_process) == (2, 4, 2)
    assert (plan.mesh, plan.global_batch, plan.per_device_batch) == ({"batch": 4, "model": 1}, 64, 16)
    assert plan.steps == 90  # 4 epochs of 1,437 images are 89.8 batches of 64
    assert plan.steps_per_epoch == 1437 / 64
    assert plan.epochs == 90 * 64 / 1437
    assert plan.parameters == 701_466
    assert plan.run_directory == str(tmp_path / "runs" / "quickstart")


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        (["train.epochs=1"], 23),
        (
            [
                "train.epochs=1",
                "train.batch_size=1437",
                "mesh.batch=1",
                "mesh.model=4",
                "model.batch_norm=global",
            ],
            1,
        ),
        (["train.epochs=0.01"], 1),
        (["train.steps=7"], 7),
        (["train.steps=7", "train.epochs=100"], 7),
    ],
)
def test_steps_come_from_epochs_unless_they_are_set(planned, overrides, steps):
    plan = planned("schedule.warmup_epochs=0", *overrides)
    assert plan.steps == steps
    assert plan.epochs == pytest.approx(steps * plan.global_batch / 1437)
    assert plan.run_config().train.steps == steps


@pytest.mark.parametrize(
    ("cluster", "overrides", "mesh", "per_device"),
    [
        ("local-2x2", ["mesh.model=2"], {"batch": 2, "model": 2}, 32),
        ("local-2x2", ["mesh.model=4"], {"batch": 1, "model": 4}, 64),
        ("local-2x2", ["mesh.batch=2", "mesh.model=2"], {"batch": 2, "model": 2}, 32),
        ("local-8", [], {"batch": 8, "model": 1}, 8),
        ("local-1", [], {"batch": 1, "model": 1}, 64),
    ],
)
def test_mesh_takes_all_devices_and_the_batch_divides_over_it(planned, cluster, overrides, mesh, per_device):
    plan = planned("model.batch_norm=8", *overrides, cluster=cluster)
    assert (plan.mesh, plan.per_device_batch) == (mesh, per_device)
    assert plan.config["mesh"] == mesh


@pytest.mark.parametrize(
    ("cluster", "model", "told"),
    [
        (
            "local-2x3",
            3,
            "mesh.model = 3 divides few of resnet18's channels: each device would hold 0.9996 of",
        ),
        ("local-2x5", 5, "mesh.model = 5 divides few of resnet18's channels"),
        ("local-2x6", 6, "Allowed: 1, 2, 4"),
        ("slurm-4x8", 16, "does not fit into one of the 4 slices or nodes"),
        ("slurm-4x8", 16, "32 (4 processes × 8), 8 in each. Allowed: 1, 2, 4, 8"),
        ("slurm-2x0", 2, "does not fit into one of the 2 slices or nodes"),
    ],
)
def test_a_model_axis_that_crosses_nodes_or_splits_next_to_nothing_is_refused(planned, cluster, model, told):
    with pytest.raises(UserError) as e:
        planned(f"mesh.model={model}", "train.batch_size=960", "model.batch_norm=8", cluster=cluster)
    assert told in str(e.value)


def test_a_model_axis_fits_into_a_tpu_slice_but_not_over_two():
    recipe = Path(configs.__file__).parent / "r50.yaml"
    images = ["data.train.path=gs://bucket/train", "data.eval.path=gs://bucket/eval"]
    config = load(recipe, ["mesh.model=16", *images])
    assert plan_on("tpu-v4-32", config).mesh == {"batch": 1, "model": 16}
    config = load(recipe, ["mesh.model=32", *images])
    with pytest.raises(UserError) as e:
        plan_on("tpu-v4-32x2", config)
    assert "does not fit into one of the 2 slices" in str(e.value)


def plan_on(cluster, config):
    where = {"name": "r50", "root": "gs://bucket/runs", "config_file": Path("r50.yaml"), "provenance": {}}
    return make_plan(config, resolve(cluster), **where)


@pytest.mark.parametrize(("model", "share"), [(1, 1), (2, 0.5), (4, 0.25)])
def test_the_plan_tells_what_share_of_the_parameters_a_device_holds(planned, model, share):
    plan = planned(f"mesh.model={model}")
    assert plan.parameter_share == pytest.approx(share, rel=0.01)


# With batch 64 over 4 devices, a device has 16 images.
@pytest.mark.parametrize(
    "overrides",
    [
        ["model.batch_norm=4"],
        ["model.batch_norm=16"],
        ["model.batch_norm=32"],
        ["model.batch_norm=64"],
        ["model.batch_norm=32", "train.accumulate=2"],
        ["model.batch_norm=global", "train.accumulate=16"],
    ],
)
def test_batch_norm_groups_that_divide_a_device_or_span_whole_ones_are_planned(planned, overrides):
    assert planned(*overrides).per_device_batch == 16


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["mesh.model=3"], ["mesh.model = 3", "4 (2 processes × 2)", "Allowed: 1, 2, 4"]),
        (["mesh.model=8"], ["mesh.model = 8", "Allowed: 1, 2, 4"]),
        (["mesh.batch=3"], ["mesh.batch = 3 × mesh.model = 1 needs 3 devices", '"local-2x2" has 4', "mesh.batch=-1"]),
        (["mesh.batch=4", "mesh.model=2"], ["needs 8 devices"]),
        (["train.batch_size=63"], ["train.batch_size = 63", "mesh.batch = 4", "nearest: 60 or 64"]),
        (["train.batch_size=3"], ["train.batch_size = 3", "nearest: 4"]),
        (["train.accumulate=3"], ["train.accumulate = 3", "16 images of a device", "a divisor of 16"]),
        (["train.accumulate=32"], ["train.accumulate = 32", "a divisor of 16"]),
        (["model.batch_norm=7"], ["model.batch_norm = 7", "a divisor of 16, or global"]),
        (["model.batch_norm=48"], ["model.batch_norm = 48", "the 16 images"]),
        (["model.batch_norm=128"], ["model.batch_norm = 128"]),
        (["model.batch_norm=64", "train.accumulate=2"], ["model.batch_norm = 64", "the 8 images", "a divisor of 8"]),
        (["train.batch_size=1440", "model.batch_norm=8"], ["train.batch_size = 1440", "1437 training examples", "lower it"]),
        (["train.epochs=1", "schedule.warmup_epochs=2"], ["schedule.warmup_epochs = 2", "(23 steps)", "shorten it"]),
        # 4 epochs are 89.8 steps: all 90 would be warm-up.
        (["schedule.warmup_epochs=4"], ["schedule.warmup_epochs = 4", "(90 steps)"]),
        (["train.steps=3"], ["schedule.warmup_epochs = 1", "(3 steps)"]),
        (["train.epochs=1e307"], ["train.epochs"]),
        (["train.steps=1" + "0" * 400], ["train.steps"]),
    ],
)  # fmt: skip
def test_what_the_machines_cannot_do_is_refused_with_what_they_can(planned, overrides, fragments):
    with pytest.raises(UserError) as refused:
        planned(*overrides)
    (line,) = str(refused.value).splitlines()
    assert [f for f in fragments if f not in line] == [], line


def test_all_problems_of_a_plan_are_reported_at_once(planned):
    with pytest.raises(UserError) as refused:
        planned("train.batch_size=1501", "schedule.warmup_epochs=9")
    keys = [line.split()[0] for line in str(refused.value).splitlines()]
    assert keys == ["train.batch_size", "train.batch_size", "schedule.warmup_epochs"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_plan_of_every_recipe_survives_json_and_gives_its_config_back(path, tmp_path):
    config = load(path)
    plan = make_plan(
        config, resolve("local-2x2"), name="x", root=str(tmp_path), config_file=path, provenance={}
    )
    assert Plan.from_json(plan.to_json()) == plan
    resolved = plan.run_config()
    assert (resolved.mesh.batch, resolved.mesh.model, resolved.train.steps) == (4, 1, plan.steps)
    assert resolved.model_copy(update={"mesh": config.mesh, "train": config.train}) == config


def test_plan_is_json_that_other_programs_can_read(planned):
    assert json.loads(planned().to_json())["config"]["data"]["mean"] == [0.305, 0.305, 0.305]


# Going on with a run


@pytest.mark.parametrize(
    ("override", "cluster"),
    [
        ("mesh.model=2", "local-2x2"),
        ("mesh.batch=-1", "local-4"),
        ("train.epochs=20", "local-2x2"),
        ("train.steps=40", "local-2x2"),
        ("train.eval_every_epochs=1", "local-2x2"),
        ("data.read_threads=0", "local-2x2"),
        ("data.prefetch_batches=1", "local-2x2"),
        ("checkpoint.keep_last=9", "local-2x2"),
        ("log.every_steps=1", "local-2x2"),
    ],
)
def test_where_how_long_and_how_loud_may_change_on_resume(planned, override, cluster):
    old = Plan.from_json(planned().to_json())  # as it is read from plan.json
    assert differences(old, planned(override, cluster=cluster)) == []


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("model.width=8", "model.width: 16, now 8"),
        ("model.dtype=bfloat16", "model.dtype: float32, now bfloat16"),
        ("augment.flip=true", "augment.flip: False, now True"),
        ("data.mean=[0, 0, 0]", "data.mean: [0.305, 0.305, 0.305], now [0.0, 0.0, 0.0]"),
        ("train.batch_size=32", "train.batch_size: 64, now 32"),
        ("train.seed=1", "train.seed: 0, now 1"),
        ("train.ema_decay=0.99", "train.ema_decay: None, now 0.99"),
        ("optimizer.name=adamw", "optimizer.name: sgd, now adamw"),
        ("schedule.name=linear", "schedule.name: cosine, now linear"),
    ],
)
def test_what_the_checkpoints_depend_on_may_not_change_on_resume(planned, override, difference):
    old = Plan.from_json(planned("model.batch_norm=8").to_json())
    assert differences(old, planned("model.batch_norm=8", override)) == [difference]
