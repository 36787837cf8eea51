"""What a dry run prints for a local cluster; tests/clusters starts the processes."""

import shlex
import subprocess
import sys
from dataclasses import replace

import pytest

from launcher import backends
from launcher.backends import local
from launcher.gang import State
from launcher.rundir import RunDirectory

# A difference that is meant: copy what `launch --dry-run configs/quickstart.yaml` prints below the plan.
RENDERED = """\
LAUNCH_COORDINATOR=127.0.0.1:PORT LAUNCH_PROCESSES=2 LAUNCH_PROCESS=0 LAUNCH_RUN=/runs/quickstart \
JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 {python} -P -m podlaunch.host worker --exit-with-stdin
LAUNCH_COORDINATOR=127.0.0.1:PORT LAUNCH_PROCESSES=2 LAUNCH_PROCESS=1 LAUNCH_RUN=/runs/quickstart \
JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2 {python} -P -m podlaunch.host worker --exit-with-stdin"""


def test_render_shows_a_command_a_process(planned):
    plan = replace(planned(), run_directory="/runs/quickstart")
    assert local.render(plan) == RENDERED.format(python=shlex.quote(sys.executable))


def test_gpus_are_left_to_jax(planned):
    plan = replace(planned(), platform="gpu", processes=1, devices_per_process=8)
    assert "JAX_" not in local.render(plan)


@pytest.mark.parametrize("folder", ["with space", "it's", 'a"b', "$HOME", "a;b&c", "`id`", "grün"])
def test_run_directory_survives_a_real_shell(planned, tmp_path, folder):
    plan = planned(root=tmp_path / folder)
    first = local.render(plan).splitlines()[0]
    command = first.replace(shlex.join(local.WORKER), "printenv LAUNCH_RUN")
    output = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout
    assert output == f"{plan.run_directory}\n"


def test_every_backend_can_be_loaded_by_its_name():
    for name in backends.BACKENDS:
        assert {"render", "start"} <= set(dir(backends.get(name)))


def test_run_without_a_launcher_is_as_its_result_says(planned):
    run = RunDirectory(planned().run_directory)
    run.path.mkdir(parents=True)
    assert local.state(run) == State("interrupted")
    run.write_result({"status": "completed"})
    assert local.state(run) == State("completed")
    with run.locked():
        assert local.state(run) == State("running")
