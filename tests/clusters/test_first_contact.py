"""deploy/first_contact.sh on a machine, on SLURM and on Cloud TPU: a table in which every check is ok, or says what is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster
SCRIPT = Path(__file__).parents[2] / "deploy" / "first_contact.sh"


def first_contact(run, *arguments, code=0):
    """The table, by check: (result, detail)."""
    environment = {
        **run.environment,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FIRST_CONTACT_RECIPE": str(run.recipe),
        "FIRST_CONTACT_BATCH": "16",
    }
    command = [str(SCRIPT), *arguments]
    done = subprocess.run(command, cwd=run.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    (table,) = run.folder.glob("first-contact-*/table.md")
    assert table.read_text() in done.stdout
    rows = [line.strip("| ").split(" | ", 3) for line in table.read_text().splitlines()[2:]]
    return {check: (result, detail) for check, result, _, detail in rows}


def assert_trained(table):
    assert {result for result, _ in table.values()} == {"ok"}
    assert table["trains from nothing"][1].startswith("completed   step 40 ")
    assert table["resumes from its checkpoint"][1].startswith("completed   step 80 ")
    assert table["stops and saves when asked"][1].startswith("stopped ")


def test_here(run):
    table = first_contact(run, "local-2", "--root", str(run.root))
    assert_trained(table)
    assert table["what jax saw"] == ("ok", "devices     2 × cpu in 1 slice")


def test_on_slurm(raised_slurm, make_run):
    run = make_run(environment=os.environ | raised_slurm.environment)
    table = first_contact(run, "slurm-2x0", f"--root={run.root}")
    assert_trained(table)
    assert table["SLURM"][1].startswith("slurm")
    raised_slurm.wait_until_idle()


def test_on_cloud_tpu_the_slice_is_created_once_and_deleted(cloud_run, cloud):
    before = cloud.creations()
    table = first_contact(cloud_run, "tpu-v4-8", "--root", cloud_run.root_place)
    assert_trained(table)
    assert table["the slice is deleted"][0] == "ok"
    assert cloud.creations() == before + 1
    assert cloud.nothing_is_left


def test_what_cannot_be_planned_is_told_in_the_table(run):
    table = first_contact(run, "slurm-2", code=1)
    assert table["plan"][0] == "failed"
    assert table["plan"][1].startswith("error: cluster = slurm-2: unknown")


def test_without_a_cluster_it_says_how_it_is_used(run):
    done = subprocess.run([str(SCRIPT)], cwd=run.folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert "deploy/first_contact.sh slurm-2x8" in done.stderr
    assert not list(run.folder.glob("first-contact-*"))
