"""The product's programs, compiled for TPU slices and GPU nodes that are not there: see benchmarks/compiled.py."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
COMPILERS = Path(os.environ.get("COMPILERS", Path(sys.prefix) / "compilers"))
# The recipe of the docs, but small enough to compile in seconds. A process has 64 images a device.
SMALL = ("model.name=resnet4", "model.width=16", "data.image_size=32", "model.batch_norm=64")
CLUSTERS = {
    "tpu-v4-32": ("train.batch_size=1024",),
    "tpu-v5e-16x2": ("train.batch_size=2048",),
    "tpu-v6e-16x2": ("train.batch_size=2048", "mesh.model=2"),
    "slurm-1x8": ("train.batch_size=512",),
    "slurm-4x8": ("train.batch_size=2048",),
}
SLICE = 16
"""Devices of each TPU slice above."""

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def compiled():
    """The programs of a cluster, by their names."""
    if not COMPILERS.is_dir():
        assert "CI" not in os.environ, "CI runs these tests: `make compilers`"
        pytest.skip("the compilers are not installed: `make compilers`")

    @cache
    def compile_for(cluster):
        command = [
            sys.executable,
            "-m",
            "benchmarks.compiled",
            "--json",
            "--cluster",
            cluster,
            "configs/r50.yaml",
        ]
        done = subprocess.run(
            [*command, *SMALL, *CLUSTERS[cluster]], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return {p["program"]: p for p in map(json.loads, done.stdout.splitlines())}

    return compile_for


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_all_programs_compile_and_the_whole_state_is_donated(compiled, cluster):
    programs = compiled(cluster)
    assert list(programs) == ["init", "train", "eval"]
    # The state goes in and comes out in the same memory; the metrics are the rest.
    train, init = programs["train"], programs["init"]
    assert train["donated_bytes"] == pytest.approx(init["output_bytes"], rel=0.02)
    assert train["output_bytes"] - train["donated_bytes"] < 4096
    assert init["collectives"] == []  # each device makes its own shards


@pytest.mark.parametrize("cluster", ["tpu-v5e-16x2", "tpu-v6e-16x2"])
@pytest.mark.parametrize("program", ["train", "eval"])
def test_what_devices_exchange_is_reduced_within_a_slice_before_it_leaves_it(compiled, cluster, program):
    collectives = compiled(cluster)[program]["collectives"]
    within = [c for c in collectives if c["op"] != "send"]
    assert all(c["groups"] for c in within)
    assert all(len({n // SLICE for n in group}) == 1 for c in within for group in c["groups"])
    out, inside = (
        sum(c["bytes"] for c in collectives if (c["op"] == "send") == leaves) for leaves in (True, False)
    )
    assert 0 < out <= inside


@pytest.mark.parametrize("cluster", ["tpu-v4-32", "slurm-1x8", "slurm-4x8"])
def test_devices_exchange_gradients_and_sums_alone(compiled, cluster):
    collectives = compiled(cluster)["train"]["collectives"]
    assert {c["op"] for c in collectives} == {"all-reduce"}
    assert len(collectives) <= 3


def test_bytes_of_a_gpu_program_are_counted_since_its_compiler_does_not_tell(compiled):
    programs = compiled("slurm-1x8")
    train, evaluation = programs["train"], programs["eval"]
    assert train["accessed_bytes"] is None
    # A gradient reads and writes the activations of both passes, and each parameter several times.
    assert train["counted_bytes"] > 3 * evaluation["counted_bytes"]
    assert evaluation["counted_bytes"] > evaluation["argument_bytes"]
