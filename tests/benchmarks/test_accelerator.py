"""benchmarks/accelerator.py on a CPU: every row comes, and a side that fails or lacks its package is a row that says why."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.accelerator import PEAKS, Ended, Side, Table, flops_of, main, overrides_of, run
from configs.load import load

REPOSITORY = Path(__file__).parents[2]
SIDE = Side("ours, synthetic", "resnet50", [], ("bare step", "loop, synthetic"))


def python(program: str) -> Side:
    return Side("a side", "resnet50", [sys.executable, "-c", program], ("it",))


def table() -> Table:
    config = load(REPOSITORY / "configs" / "r50.yaml", overrides_of("resnet50", 256, []))
    return Table({"resnet50": config})


@pytest.mark.cluster
def test_the_rehearsal_measures_every_row(tmp_path):
    command = [sys.executable, "-m", "benchmarks.accelerator", "--rehearse", "--json", str(tmp_path / "kept")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "kept").read_text())
    assert kept["device"]["platform"] == "cpu"
    rows = {row["side"]: row for row in kept["rows"]}
    for name in ("bare step", "loop, synthetic", "input alone", "loop, streamed"):
        assert "problem" not in rows[name], rows[name]
        assert rows[name]["images_per_second"] > 0
    assert rows["bare step"]["kernel_ms"]["convolution"] > 0
    assert rows["bare step"]["bytes_per_image"] > 0
    assert 0 <= rows["loop, streamed"]["data_wait_share"] <= 1
    assert {"torch, default", "torch, reduce-overhead", "torch, eager"} <= rows.keys()


def test_without_a_gpu_it_says_what_can_be_done(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["accelerator"])
    with pytest.raises(SystemExit, match="2"):
        main()
    refused = capsys.readouterr().err
    assert refused.endswith("no NVIDIA GPU on this machine; --rehearse tries the script on the CPU\n")


def test_shares_are_of_what_the_maker_promises():
    rows = table()
    rows.device = {"kind": "NVIDIA H100 80GB HBM3"}
    figures = {"images_per_second": 3000.0, "bytes_per_image": 405e6}
    rows.add(SIDE, Ended({"bare step": figures, "loop, synthetic": {"images_per_second": 2940.0}}))
    bare, loop = rows.rows
    # 3 × 8.18 GFLOP an image, of 989 TFLOP/s; 405 MB an image, of 3,350 GB/s
    assert bare["share_of_peak"] == pytest.approx(3000 * 3 * 8.178e9 / 989e12, rel=1e-3)
    assert bare["share_of_bandwidth"] == pytest.approx(3000 * 405e6 / 3.35e12)
    assert bare["ms"] == pytest.approx(256 / 3)
    assert loop["share_of_peak"] == pytest.approx(0.98 * bare["share_of_peak"])
    assert "share_of_bandwidth" not in loop


def test_a_gpu_that_is_not_in_the_table_has_no_shares():
    rows = table()
    rows.device = {"kind": "NVIDIA Z900"}
    rows.add(SIDE, Ended({"bare step": {"images_per_second": 3000.0, "bytes_per_image": 405e6}}, "killed"))
    assert not {"share_of_peak", "share_of_bandwidth"} & rows.rows[0].keys()
    rows.show()


def test_peaks_are_plausible():
    assert all(
        100 < peak.tflops < 5000 and 200 < peak.gigabytes_per_second < 10000 for peak in PEAKS.values()
    )
    assert flops_of(table()._configs["resnet50"]) == pytest.approx(8.18e9, rel=0.01)


def test_another_network_is_not_compared_in_silence():
    rows = table()
    side = Side("torch, eager", "resnet50", [], ("torch, eager",))
    rows.add(side, Ended({"torch, eager": {"images_per_second": 1.0, "parameters": 25_557_033}}))
    assert rows.rows[0]["problem"] == "another network: 25,557,033 parameters, ours has 25,557,032"


def test_a_side_that_fails_is_a_row_with_its_error_and_what_it_had_measured():
    told = 'print(\'{"measured": "it", "images_per_second": 2.0}\', flush=True)'
    ended = run(python(f"{told}; raise RuntimeError('out of memory\\nand more')"), dict(os.environ), 60)
    assert ended.figures["it"]["images_per_second"] == 2
    assert ended.problem == "failed with exit code 1: RuntimeError: out of memory"
    rows = table()
    rows.add(python(""), Ended(problem="torch is not installed"))
    assert rows.rows[0]["problem"] == "torch is not installed"


@pytest.mark.cluster
def test_a_side_whose_time_is_over_ends_with_all_its_processes(tmp_path):
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    ended = run(python(program), dict(os.environ), 5)
    assert ended.problem == "left out: the time was over"
    pid = int((tmp_path / "pid").read_text())
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
