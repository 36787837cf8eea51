"""GPUs are counted from device files, limited by CUDA_VISIBLE_DEVICES; TPU names mean what Google defines."""

import pytest
from google.cloud import tpu_v2

from configs.errors import UserError
from launcher.accelerators import GENERATIONS, parse_tpu, tpu_slice
from launcher.machine.devices import num_nvidia_gpus


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, 3), ("", 0), ("-1", 0), ("1", 1), ("0,2", 2), ("0, 1 ,2", 3), ("0,1,2,3,4", 3), ("GPU-8f1c", 1)],
)
def test_gpus_are_device_files_that_cuda_may_see(tmp_path, monkeypatch, visible, expected):
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm", "nvidia-caps", "null"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert num_nvidia_gpus(tmp_path) == expected


def test_a_machine_without_gpus_has_none(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert num_nvidia_gpus(tmp_path) == 0


# Cloud TPU

# Sizes of v5p from Google's list of TPU types, and the topology that each has by default.
DEFAULT_TOPOLOGIES = {
    256: "4x4x8", 640: "4x4x20", 768: "4x8x12", 896: "4x4x28", 1152: "4x12x12", 1280: "4x8x20", 1408: "4x4x44",
    1920: "4x12x20", 2304: "8x12x12", 2560: "8x8x20", 3072: "8x12x16", 3456: "12x12x12", 4608: "12x12x16",
    5120: "8x16x20", 7808: "4x4x244", 9216: "12x16x24", 10368: "12x12x36", 11520: "12x20x24", 12288: "16x16x24",
}  # fmt: skip


@pytest.mark.parametrize("size", DEFAULT_TOPOLOGIES)
def test_a_size_has_the_shape_that_is_most_like_a_cube(size):
    assert parse_tpu(f"v5p-{size}")[0].topology == DEFAULT_TOPOLOGIES[size]


def test_the_table_holds_together():
    for generation in GENERATIONS.values():
        assert list(generation.sizes) == sorted(generation.sizes)
        assert generation.api_type in tpu_v2.AcceleratorConfig.Type.__members__
        for size, topology in generation.sizes.items():
            one = tpu_slice(generation, topology)
            assert one.accelerator_type == f"{generation.type_prefix}-{size}"
            assert one.chips == (size // 2 if generation.counts == "cores" else size)
            assert one.chips == one.vms * one.chips_per_vm
            assert one.devices_per_vm == one.chips_per_vm * generation.devices_per_chip


@pytest.mark.parametrize(
    ("text", "accelerator_type", "topology", "chips", "vms", "devices_per_vm", "num_slices"),
    [
        ("v2-8", "v2-8", "2x2", 4, 1, 8, 1),
        ("v3-32", "v3-32", "4x4", 16, 4, 8, 1),
        ("v4-8", "v4-8", "2x2x1", 4, 1, 4, 1),
        ("v4-32", "v4-32", "2x2x4", 16, 4, 4, 1),
        ("v4-2x2x4", "v4-32", "2x2x4", 16, 4, 4, 1),
        ("v4-2x2x4x2", "v4-32", "2x2x4", 16, 4, 4, 2),
        ("v4-32x2", "v4-32", "2x2x4", 16, 4, 4, 2),
        ("v5p-12288", "v5p-12288", "16x16x24", 6144, 1536, 4, 1),
        ("v5p-640", "v5p-640", "4x4x20", 320, 80, 4, 1),
        ("v5p-1280x2", "v5p-1280", "4x8x20", 640, 160, 4, 2),
        ("v5p-6912", "v5p-6912", "12x12x24", 3456, 864, 4, 1),
        ("v4-4x4x16", "v4-512", "4x4x16", 256, 64, 4, 1),
        ("v4-4x4x16x2", "v4-512", "4x4x16", 256, 64, 4, 2),
        ("v4-512", "v4-512", "4x8x8", 256, 64, 4, 1),
        ("v4-12x12x24", "v4-6912", "12x12x24", 3456, 864, 4, 1),
        ("v5e-1", "v5litepod-1", "1x1", 1, 1, 1, 1),
        ("v5e-4", "v5litepod-4", "2x2", 4, 1, 4, 1),
        ("v5e-8", "v5litepod-8", "2x4", 8, 1, 8, 1),
        ("v5e-16", "v5litepod-16", "4x4", 16, 4, 4, 1),
        ("v5e-64x2", "v5litepod-64", "8x8", 64, 16, 4, 2),
        ("v5e-4x8", "v5litepod-32", "4x8", 32, 8, 4, 1),
        ("v5e-4x8x3", "v5litepod-32", "4x8", 32, 8, 4, 3),
        ("v5e-4x3", "v5litepod-4", "2x2", 4, 1, 4, 3),
        ("v5litepod-64", "v5litepod-64", "8x8", 64, 16, 4, 1),
        ("v6e-8", "v6e-8", "2x4", 8, 1, 8, 1),
        ("v6e-256", "v6e-256", "16x16", 256, 64, 4, 1),
    ],
)
def test_tpu_names(text, accelerator_type, topology, chips, vms, devices_per_vm, num_slices):
    one, slices = parse_tpu(text)
    assert (one.accelerator_type, one.topology, one.chips, one.vms, one.devices_per_vm, slices) == (
        accelerator_type, topology, chips, vms, devices_per_vm, num_slices,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v4-40", "no such size; nearest: tpu-v4-32, tpu-v4-64"),
        ("v4-1", "no such size; nearest: tpu-v4-8"),
        ("v4-999999", "no such size; nearest: tpu-v4-8192"),
        ("v4-16384", "no such size; nearest: tpu-v4-8192"),
        ("v5p-650", "no such size; nearest: tpu-v5p-640, tpu-v5p-768"),
        ("v5p-12416", "no such size; nearest: tpu-v5p-12288"),
        ("v5p-8576", "no such size; nearest: tpu-v5p-8448, tpu-v5p-8704"),
        ("v4-4x4x10", "no such size; nearest: tpu-v4-4x4x8, tpu-v4-4x4x12"),
        ("v4-16x4x4", "no such size; nearest: tpu-v4-4x8x8, tpu-v4-4x4x20"),
        ("v4-4x4x0", "no such size; nearest: tpu-v4-2x2x1"),
        ("v4-2x2x3", "no such size; nearest: tpu-v4-2x2x2, tpu-v4-2x2x4"),
        ("v4-2x2x5x2", "no such size; nearest: tpu-v4-2x2x4, tpu-v4-2x4x4"),
        ("v4-32x0", "no such size; nearest: tpu-v4-32, tpu-v4-64"),
        ("v5litepod-2", "no such size; nearest: tpu-v5e-1, tpu-v5e-4"),
        ("v4", "no such size; nearest: tpu-v4-8"),
        ("v4-", "no such size; nearest: tpu-v4-8"),
        ("v5-8", 'unknown generation v5; did you mean "v5p"? (there are: v2, v3, v4, v5e, v5p, v6e; see'),
        ("x-8", "unknown generation x (there are: v2, v3, v4, v5e, v5p, v6e; see `launch clusters tpu`)"),
        ("7x-8", "chips newer than v6e do not come through the Cloud TPU API; allowed: v2, "),
        ("v7-8", "chips newer than v6e do not come through the Cloud TPU API; allowed: v2, "),
        ("tpu7x-8", "chips newer than v6e do not come through the Cloud TPU API; allowed: v2, "),
    ],
)
def test_tpu_names_that_mean_nothing(text, message):
    with pytest.raises(UserError) as refused:
        parse_tpu(text)
    assert str(refused.value).startswith(f"cluster = tpu-{text}: {message}")
