"""ResNet-50 and -152 on one GPU: our loop, a bare jax step and PyTorch, in one run of so many minutes.

    python -m benchmarks.accelerator --json accelerator.json
    python -m benchmarks.accelerator --rehearse        the same code on the CPU, with a tiny network

Each side is a process of its own, so that none holds the GPU's memory while another is measured; they run one after
another, the most important first. A side that fails, that lacks its package, or for which no time is left is a row
that says so. Share of the peak: FLOPs of all convolutions and of the classifier, two per multiply-add, times three
for the backward pass, against the GPU's dense bfloat16. Share of the bandwidth: operands plus results of all that the
compiled step executes, against the GPU's memory. Batch norm is over the whole batch, as PyTorch's is.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._common import REPOSITORY, print_table
from benchmarks._images import photographs
from benchmarks.rivals import last_line, python_of
from configs.architectures import ARCHITECTURES, flops_per_image, num_parameters, parameter_shapes
from configs.errors import UserError
from configs.files import cache_folder
from configs.load import load
from configs.schema import RunConfig
from launcher.clusters import resolve
from trainer.data.storage.dataset import MANIFEST
from trainer.data.tools.convert import Settings, convert

ENVIRONMENT = "torchvision"
"""Of benchmarks/environments: the one with PyTorch."""
LEAST_SECONDS = 40
"""A side is not begun with less: it would not get through its compilation."""
PHOTOGRAPHS = 1024


@dataclass(frozen=True)
class Peak:
    """What the maker promises of a GPU."""

    tflops: float
    """Dense bfloat16, on tensor cores."""
    gigabytes_per_second: float


# By the name that CUDA has for them. NVIDIA's data sheets: nvidia.com/en-us/data-center/NAME, where figures "with
# sparsity" are twice those here.
PEAKS = {
    "NVIDIA B200": Peak(2250, 8000),
    "NVIDIA H200": Peak(989, 4800),
    "NVIDIA H200 NVL": Peak(835, 4800),
    "NVIDIA H100 80GB HBM3": Peak(989, 3350),
    "NVIDIA H100 NVL": Peak(835, 3900),
    "NVIDIA H100 PCIe": Peak(756, 2000),
    "NVIDIA A100-SXM4-80GB": Peak(312, 2039),
    "NVIDIA A100 80GB PCIe": Peak(312, 1935),
    "NVIDIA A100-SXM4-40GB": Peak(312, 1555),
    "NVIDIA A100-PCIE-40GB": Peak(312, 1555),
    "NVIDIA L40S": Peak(362, 864),
    "NVIDIA L4": Peak(121, 300),
}


@dataclass(frozen=True)
class Side:
    """One process that measures, on one network."""

    name: str
    network: str
    command: list[str]
    rows: tuple[str, ...]
    """What it measures, as it calls it."""
    missing: str = ""
    """Why it cannot be run."""


@dataclass
class Ended:
    """What a side has printed, and why it ended before its end."""

    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    problem: str = ""


def run(side: Side, environment: dict[str, str], seconds: float) -> Ended:
    """Run a side for at most `seconds`; what it has measured until then counts."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            side.command,
            cwd=REPOSITORY,
            env=environment,
            stdout=out,
            stderr=err,
            start_new_session=True,  # torch.compile starts processes of its own, which are to end with it
        )
        problem = ""
        try:
            if process.wait(seconds):
                problem = f"failed with exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            problem = "left out: the time was over"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        err.seek(0)
        lines = [json.loads(line) for line in out if line.startswith("{") and line.endswith("}\n")]
        if problem.startswith("failed"):
            problem = f"{problem}: {_cause(err.read())}"
        return Ended({line["measured"]: line for line in lines}, problem)


def _cause(text: str) -> str:
    """The line of a traceback that says what went wrong."""
    errors = [line for line in text.splitlines() if line[:1].isalpha() and "Error" in line.split(":")[0]]
    return (errors[-1] if errors else last_line(text))[:160]


def pack_photographs(folder: Path, num_images: int) -> Path:
    """A dataset of photographs as `launch data convert` writes it, kept between runs."""
    destination = folder / f"photographs-{num_images}"
    if not (destination / MANIFEST).is_file():
        chunks = [64] * (num_images // 64)
        spawn = multiprocessing.get_context("spawn")  # a fork of a process that has imported jax may hang
        with tempfile.TemporaryDirectory() as images, ProcessPoolExecutor(mp_context=spawn) as pool:
            for seed, some in enumerate(pool.map(photographs, chunks, range(len(chunks)))):
                for i, jpeg in enumerate(some):
                    file = Path(images, str(i % 10), f"{seed:04}-{i:02}.jpg")
                    file.parent.mkdir(exist_ok=True)
                    file.write_bytes(jpeg)
            jobs = len(os.sched_getaffinity(0))
            convert(
                images, str(destination), Settings("imagefolder"), jobs=jobs, begin=lambda *_: lambda *_: None
            )
    return destination


def overrides_of(network: str, batch: int, extra: list[str]) -> list[str]:
    """Settings that all our measurements share, on configs/r50.yaml."""
    return [
        f"model.name={network}",
        "model.batch_norm=global",
        f"train.batch_size={batch}",
        # Noise is to be trained for long without a loss that is not finite.
        "optimizer.learning_rate=0.001",
        "checkpoint.every_minutes=null",
        "data.source=synthetic",
        "mesh.batch=1",
        *extra,
    ]


def streamed(dataset: Path, num_images: int) -> list[str]:
    split = f"{{path: '{dataset}', num_examples: {num_images}}}"
    threads = len(os.sched_getaffinity(0))
    return [
        "data.source=records",
        f"data.train={split}",
        f"data.eval={split}",
        f"data.read_threads={threads}",
    ]


def our_side(network: str, overrides: list[str], what: str, seconds: float) -> Side:
    rows = ("bare step", "loop, synthetic") if what == "synthetic" else ("input alone", "loop, streamed")
    command = [sys.executable, "-m", "benchmarks._accelerator", what, str(seconds), *overrides]
    return Side(f"ours, {what}", network, command, rows)


def torch_side(
    network: str, config: RunConfig, mode: str, seconds: float, *, python: str | None, device: str
) -> Side:
    architecture = ARCHITECTURES[network]
    settings = {
        "device": device,
        "batch": config.train.batch_size,
        "pixels": config.data.image_size,
        "num_classes": config.model.num_classes,
        "width": config.model.width,
        "kind": architecture.block,
        "layers": architecture.layers,
    }
    script = REPOSITORY / "benchmarks" / "rivals" / "torch_resnet.py"
    name = f"torch, {mode}"
    command = [python or "", str(script), mode, str(seconds), json.dumps(settings)]
    return Side(name, network, command, (name,), "" if python else "torch is not installed")


def find_torch(given: str | None, *, install: bool, deadline: float) -> str | None:
    """A Python that has torch: the one that was named, this one, or one of an environment made for it."""
    if given or importlib.util.find_spec("torch"):
        return given or sys.executable
    if not install:
        return None
    return python_of(ENVIRONMENT, cache_folder() / "rivals", max(deadline - time.monotonic(), 1))


class Table:
    """The rows as they come, and what --json keeps."""

    def __init__(self, configs: dict[str, RunConfig]):
        self._configs = configs
        self.device: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []

    def add(self, side: Side, ended: Ended) -> None:
        self.device = self.device or ended.figures.get("device", {})
        for name in side.rows:
            row = {"network": side.network, "side": name, **ended.figures.get(name, {})}
            missing = name not in ended.figures
            if name == "bare step":
                row |= ended.figures.get("kernels", {})
                missing = "kernel_ms" not in row
            if missing:
                row["problem"] = ended.problem or "nothing was measured"
            if "images_per_second" in row:
                self._share(row)
            self.rows.append(row)

    def _share(self, row: dict[str, Any]) -> None:
        config, rate = self._configs[row["network"]], row["images_per_second"]
        row["ms"] = 1e3 * config.train.batch_size / rate
        peak = PEAKS.get(self.device.get("kind", ""))
        if peak and row["side"] != "input alone":
            row["share_of_peak"] = rate * 3 * flops_of(config) / (peak.tflops * 1e12)
        if peak and "bytes_per_image" in row:
            row["share_of_bandwidth"] = rate * row["bytes_per_image"] / (peak.gigabytes_per_second * 1e9)
        m = config.model
        shapes = parameter_shapes(m.name, num_classes=m.num_classes, width=m.width, stem=m.stem)
        expected = num_parameters(shapes)
        if row.get("parameters", expected) != expected:
            row["problem"] = f"another network: {row['parameters']:,} parameters, ours has {expected:,}"

    def show(self) -> None:
        print()
        header = ["network, side", "images/s", "ms a step", "of peak", "of bandwidth"]
        print_table(header, [self._cells(row) for row in self.rows])
        for row in self.rows:
            if remarks := list(filter(None, self._remarks(row))):
                print(f"{row['network']}, {row['side']}: {'; '.join(remarks)}")
        for row in self.rows:
            if "kernel_ms" in row:
                total = sum(row["kernel_ms"].values())
                kinds = ", ".join(f"{kind} {ms:.2f} ms" for kind, ms in row["kernel_ms"].items())
                print(
                    f"\n{row['network']}, kernels {total:.2f} ms a step: {kinds}; idle {row['idle_share']:.1%}"
                )
                for name, ms in row["longest_ms"].items():
                    print(f"  {ms:8.3f} ms  {name[:100]}")

    @staticmethod
    def _remarks(row: dict[str, Any]) -> list[str]:
        return [
            row.get("problem", ""),
            f"{row['bytes_per_image'] / 1e6:.0f} MB an image" if "bytes_per_image" in row else "",
            f"{row['data_wait_share']:.0%} of the time waits for data" if "data_wait_share" in row else "",
            f"with {row['cores']} cores" if "cores" in row else "",
            f"graphs not captured: {row['cudagraph_skips']}" if row.get("cudagraph_skips") else "",
        ]

    @staticmethod
    def _cells(row: dict[str, Any]) -> list[str]:
        columns = {
            "images_per_second": ",.0f",
            "ms": ".1f",
            "share_of_peak": ".1%",
            "share_of_bandwidth": ".1%",
        }
        figures = [f"{row[key]:{form}}" if key in row else "" for key, form in columns.items()]
        return [f"{row['network']}, {row['side']}", *figures]


def flops_of(config: RunConfig) -> int:
    """Of a forward pass, for one image."""
    m = config.model
    return flops_per_image(
        m.name, image_size=config.data.image_size, num_classes=m.num_classes, width=m.width, stem=m.stem
    )


def environment_of(*, rehearse: bool, compiled: str) -> dict[str, str]:
    """One GPU, and one place for compiled programs: the loop need not compile what the bare step has."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    ours = (
        {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "CUDA_VISIBLE_DEVICES": ""}
        if rehearse
        # Named, so that jax raises where CUDA does not work, and does not fall back to the CPU. It takes three
        # quarters of the memory at its start, as in training: nothing else runs then.
        else {"JAX_PLATFORMS": "cuda,cpu", "CUDA_VISIBLE_DEVICES": first}
    )
    return os.environ | ours | {"JAX_COMPILATION_CACHE_DIR": compiled}


def sides(
    arguments: argparse.Namespace,
    configs: dict[str, RunConfig],
    overrides: dict[str, list[str]],
    deadline: float,
) -> Iterator[Side]:
    """The sides in the order of their importance, each made when its turn comes."""
    modes = ("default", "reduce-overhead", "eager")
    python: str | None = None
    for i, (network, config) in enumerate(configs.items()):
        yield our_side(network, overrides[network], "synthetic", arguments.seconds)
        if i == 0:
            python = find_torch(arguments.torch_python, install=not arguments.rehearse, deadline=deadline)
        for mode in modes:
            device = "cpu" if arguments.rehearse else "cuda"
            yield torch_side(network, config, mode, arguments.seconds, python=python, device=device)
        if i == 0 and deadline - time.monotonic() > LEAST_SECONDS:
            num_images = 64 if arguments.rehearse else PHOTOGRAPHS
            dataset = pack_photographs(cache_folder(), num_images)
            records = [*overrides[network], *streamed(dataset, num_images)]
            yield our_side(network, records, "streamed", arguments.seconds)


def measure(arguments: argparse.Namespace) -> Table:
    deadline = time.monotonic() + 60 * arguments.minutes
    batches = {n: arguments.batch // (2 if n == "resnet152" else 1) for n in arguments.networks}
    overrides = {n: overrides_of(n, batch, arguments.overrides) for n, batch in batches.items()}
    configs = {n: load(REPOSITORY / "configs" / "r50.yaml", o) for n, o in overrides.items()}
    table = Table(configs)
    with tempfile.TemporaryDirectory() as compiled:
        environment = environment_of(rehearse=arguments.rehearse, compiled=compiled)
        for side in sides(arguments, configs, overrides, deadline):
            left = deadline - time.monotonic()
            if side.missing:
                ended = Ended(problem=side.missing)
            elif left < LEAST_SECONDS:
                ended = Ended(problem="left out: the time was over")
            else:
                print(f"{side.network}, {side.name}: {left:.0f} s left", flush=True)
                ended = run(side, environment, left)
            table.add(side, ended)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8, help="for all; what does not fit is left out")
    parser.add_argument(
        "--seconds", type=float, default=10, help="of each measurement, after it has warmed up"
    )
    parser.add_argument(
        "--networks", nargs="+", default=["resnet50", "resnet152"], choices=list(ARCHITECTURES)
    )
    parser.add_argument("--batch", type=int, default=256, help="of ResNet-50; ResNet-152 has half of it")
    parser.add_argument(
        "--torch-python", help="a Python that has torch (default: this one, else one made for it)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to keep all figures")
    parser.add_argument(
        "--rehearse", action="store_true", help="a tiny network on the CPU, to try the script"
    )
    arguments = parser.parse_args()
    arguments.overrides = []
    if arguments.rehearse:
        arguments.networks, arguments.batch, arguments.seconds = ["resnet4"], 8, 0.5
        arguments.overrides = ["model.width=8", "data.image_size=32", "model.num_classes=10"]
    else:
        try:
            if resolve("local").platform != "gpu":
                raise UserError("no NVIDIA GPU on this machine; --rehearse tries the script on the CPU")
        except UserError as e:
            parser.error(str(e))
    table = measure(arguments)
    table.show()
    if arguments.json:
        arguments.json.write_text(json.dumps({"device": table.device, "rows": table.rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
