"""What a run on Cloud TPUs costs: prices.yaml, and an estimate of the whole run by the roofline."""

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import configs
from configs.architectures import flops_per_image
from configs.errors import UserError
from configs.load import nearest
from configs.schema import ModelConfig
from launcher.accelerators import GENERATIONS, TpuSlice

PROVISIONING = ("on-demand", "spot", "reserved")
# The backward pass takes twice the FLOPs of the forward pass.
TRAINING_PASSES = 3
# Of the device's memory, measured on compiled train steps of ResNet-50 and ResNet-152 at 224 pixels in bfloat16.
BYTES_PER_FLOP = 0.015


@dataclass(frozen=True)
class Estimate:
    chips: int
    chip_hours: float
    """Lower bound for the whole run."""
    usd_per_hour: float | None
    """None where no price is known."""
    usd: float | None
    """Lower bound for the whole run; None where no price is known."""


def estimate(
    model: ModelConfig,
    *,
    image_size: int,
    num_images: int,
    tpu: TpuSlice,
    num_slices: int,
    price: float | None,
) -> Estimate:
    """A lower bound by the roofline: every chip computes at its peak, or reads its memory at full bandwidth.

    `num_images`: images of the whole run; `price`: USD a chip-hour. See Williams et al., "Roofline", 2009.
    """
    forward = flops_per_image(
        model.name, image_size=image_size, num_classes=model.num_classes, width=model.width, stem=model.stem
    )
    flops = TRAINING_PASSES * forward * num_images
    chip, chips = tpu.generation, tpu.chips * num_slices
    compute_seconds = flops / (chip.bf16_tflops * 1e12)
    memory_seconds = flops * BYTES_PER_FLOP / (chip.hbm_gb_per_second * 1e9)
    chip_hours = max(compute_seconds, memory_seconds) / 3600
    if price is None:
        return Estimate(chips, chip_hours, None, None)
    return Estimate(chips, chip_hours, price * chips, price * chip_hours)


def describe(estimate: Estimate) -> str:
    """The estimate in one line."""
    hours = f"{estimate.chip_hours:,.1f}" if estimate.chip_hours >= 1 else f"{estimate.chip_hours:.2g}"
    return (
        f"{describe_hourly(estimate)}; "
        f"at least {hours} chip-hours{_usd(estimate.usd)} for the whole run, by the roofline"
    )


def describe_hourly(estimate: Estimate) -> str:
    """What an hour costs."""
    return f"{estimate.chips} chips, {estimate.chips} chip-hours{_usd(estimate.usd_per_hour)} an hour"


def _usd(usd: float | None) -> str:
    return "" if usd is None else f" (${usd:,.2f})"


def cost_so_far(chips: int, hours: float, price: float | None) -> str:
    """Chip-hours and cost of chips that have existed for `hours`, as a phrase; `price`: USD a chip-hour."""
    usd = "" if price is None else f", ${price * chips * hours:,.2f}"
    return f"{hours:.1f} h, {chips * hours:,.1f} chip-hours{usd}"


def price(generation: str, provisioning: str) -> float | None:
    """USD a chip-hour; None where no price is known. Raises UserError, as `load_prices`."""
    return load_prices().get(generation, {}).get(provisioning)


def files() -> list[Path]:
    """Where prices are looked up, the first first."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return [home / "podlaunch" / "prices.yaml", Path(configs.__file__).with_name("prices.yaml")]


def load_prices() -> dict[str, dict[str, float]]:
    """USD a chip-hour, by generation and provisioning. Raises UserError with what is wrong in the files."""
    found: dict[str, dict[str, float]] = {}
    for file in reversed(files()):
        if file.is_file():
            for generation, prices in _read(file).items():
                found[generation] = found.get(generation, {}) | prices
    return found


def _read(file: Path) -> dict[str, dict[str, float]]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as e:
        raise UserError(f"{file}: cannot be read: {' '.join(str(e).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: it is a mapping of TPU generations to USD a chip-hour, such as v4: 3.22")
    return {_checked_name(file, "generation", g, GENERATIONS): _prices(file, g, v) for g, v in values.items()}


def _prices(file: Path, generation: str, value: Any) -> dict[str, float]:
    """A number is the price on demand."""
    prices = value if isinstance(value, dict) else {"on-demand": value}
    for provisioning, price in prices.items():
        _checked_name(file, f"{generation}: provisioning", provisioning, PROVISIONING)
        if type(price) not in (int, float) or not 0 < price < float("inf"):
            key = f"{generation}: {provisioning}"
            raise UserError(f"{file}: {key} = {price}: must be USD a chip-hour, a number above 0")
    return prices


def _checked_name(file: Path, what: str, name: Any, allowed: Collection[str]) -> str:
    if name not in allowed:
        hint = nearest(str(name), list(allowed))
        raise UserError(f"{file}: {what} {name}: unknown{hint} (there are: {', '.join(allowed)})")
    return str(name)
