"""Which CUDA the driver of a machine can run, from the two forms in which NVIDIA's modules tell their version."""

import pytest

from launcher.machine.devices import cuda_advice

CLOSED = """\
NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Oct 19 18:56:32 UTC 2023
GCC version:  gcc version 11.4.0 (Ubuntu 11.4.0-1ubuntu1~22.04)
"""
OPEN = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder@U22-I3-B01)  Fri Nov  7
GCC version:  gcc version 13.3.0 (Ubuntu 13.3.0-6ubuntu2~24.04)
"""


@pytest.mark.parametrize("text", [CLOSED, OPEN])
@pytest.mark.parametrize(
    ("version", "advice"),
    [
        ("470.57.02", "update the NVIDIA driver to 525 or newer (it is 470), then pip install 'podlaunch[cuda12]'"),
        ("525.60.13", "pip install 'podlaunch[cuda12]' (the NVIDIA driver is 525)"),
        ("575.57.08", "pip install 'podlaunch[cuda12]' (the NVIDIA driver is 575)"),
        ("580.65.06", "pip install 'podlaunch[cuda13]' (the NVIDIA driver is 580)"),
        ("590.48", "pip install 'podlaunch[cuda13]' (the NVIDIA driver is 590)"),
    ],
)  # fmt: skip
def test_the_extra_suits_the_driver(tmp_path, text, version, advice):
    (tmp_path / "version").write_text(text.format(version))
    assert cuda_advice(tmp_path / "version") == advice


@pytest.mark.parametrize("text", [None, "", "GCC version:  gcc version 525.4.0\n"])
def test_a_driver_that_does_not_tell_its_version(tmp_path, text):
    if text is not None:
        (tmp_path / "version").write_text(text)
    assert "podlaunch[cuda12]" in cuda_advice(tmp_path / "version")
    assert "580 or newer" in cuda_advice(tmp_path / "version")
