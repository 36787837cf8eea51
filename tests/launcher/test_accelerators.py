"""GPUs are counted from device files, as far as the user lets us see them."""

import pytest

from launcher.accelerators import num_nvidia_gpus


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
