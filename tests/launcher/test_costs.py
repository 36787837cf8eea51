"""The lower bound of a run's cost, and the prices it is computed from."""

import pytest

from configs.architectures import flops_per_image
from configs.errors import UserError
from configs.schema import ModelConfig
from launcher.accelerators import GENERATIONS, parse_tpu
from launcher.costs import Estimate, describe, estimate, files, load_prices, price


@pytest.fixture(autouse=True)
def user_prices(tmp_path, monkeypatch):
    """Writes the user's own prices file, which is absent at first."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def write(text: str) -> None:
        files()[0].parent.mkdir(parents=True)
        files()[0].write_text(text)

    return write


def run_of(name: str, *, provisioning: str = "on-demand") -> Estimate:
    """ResNet-50 on ImageNet for 90 epochs, on the slices called `name`."""
    tpu, num_slices = parse_tpu(name)
    return estimate(
        ModelConfig(), image_size=224, num_images=112_603 * 1024, tpu=tpu, num_slices=num_slices,
        price=price(tpu.generation.name, provisioning),
    )  # fmt: skip


def test_memory_bounds_a_resnet_and_the_price_follows():
    flops = 3 * flops_per_image("resnet50", image_size=224, num_classes=1000, width=64, stem="imagenet")
    done = run_of("v4-32")
    assert done.chip_hours == pytest.approx(112_603 * 1024 * flops * 0.015 / 1228e9 / 3600)
    assert (done.chips, done.usd_per_hour, done.usd) == (16, 16 * 3.22, done.chip_hours * 3.22)


@pytest.mark.parametrize("name", ["v4-8", "v4-32x2"])
def test_chip_hours_do_not_depend_on_how_many_share_them(name):
    assert run_of(name).chip_hours == run_of("v4-32").chip_hours


def test_slices_count():
    assert (run_of("v4-32x2").chips, run_of("v4-32x2").usd_per_hour) == (32, 32 * 3.22)


def test_arithmetic_bounds_where_memory_is_fast():
    v2 = run_of("v2-8")  # 46 TFLOP/s are less than what 700 GB/s feed
    flops = 3 * flops_per_image("resnet50", image_size=224, num_classes=1000, width=64, stem="imagenet")
    assert v2.chip_hours == pytest.approx(112_603 * 1024 * flops / 46e12 / 3600)


def test_without_a_price_there_are_chip_hours(user_prices):
    done = run_of("v4-32", provisioning="spot")
    assert (done.usd_per_hour, done.usd) == (None, None)
    user_prices("v4: {spot: 1.5}")
    assert run_of("v4-32", provisioning="spot").usd_per_hour == 24


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (
            Estimate(16, 5.2, 51.52, 16.744),
            "16 chips, 16 chip-hours ($51.52) an hour; at least 5.2 chip-hours ($16.74) for the whole run, "
            "by the roofline",
        ),
        (
            Estimate(4, 0.00123, None, None),
            "4 chips, 4 chip-hours an hour; at least 0.0012 chip-hours for the whole run, by the roofline",
        ),
        (
            Estimate(2048, 12345.6, 6594.56, 39752.8),
            "2048 chips, 2048 chip-hours ($6,594.56) an hour; at least 12,345.6 chip-hours ($39,752.80) for the "
            "whole run, by the roofline",
        ),
    ],
)
def test_an_estimate_is_one_line(given, line):
    assert describe(given) == line


def test_every_generation_has_a_price():
    assert load_prices().keys() == GENERATIONS.keys()
    assert load_prices()["v4"] == {"on-demand": 3.22}


def test_the_users_own_prices_go_before_ours(user_prices):
    user_prices("v4: {spot: 1.5}\nv5e: 1\n")
    found = load_prices()
    assert (found["v4"], found["v5e"]) == ({"on-demand": 3.22, "spot": 1.5}, {"on-demand": 1})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v4: free", "v4: on-demand = free: must be USD a chip-hour, a number above 0"),
        ("v4: {spot: -1}", "v4: spot = -1: must be USD a chip-hour"),
        ("v4: .inf", "v4: on-demand = inf: must be USD a chip-hour"),
        ("v4: true", "v4: on-demand = True: must be USD a chip-hour"),
        ("v5: 1", 'generation v5: unknown; did you mean "v5p"? (there are: v2, v3, v4, v5e, v5p, v6e)'),
        ("v4: {sopt: 1}", 'v4: provisioning sopt: unknown; did you mean "spot"? (there are: on-demand, spot, r'),
        ("[1]", "it is a mapping of TPU generations to USD a chip-hour, such as v4: 3.22"),
        ("v4: [", "cannot be read: while parsing"),
    ],
)  # fmt: skip
def test_invalid_prices_are_refused(user_prices, text, message):
    user_prices(text)
    with pytest.raises(UserError) as refused:
        load_prices()
    assert str(refused.value).startswith(f"{files()[0]}: {message}")
    assert len(str(refused.value).splitlines()) == 1
