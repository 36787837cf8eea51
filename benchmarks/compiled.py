"""What XLA's compilers for TPU slices and for GPU nodes make of our programs, without a TPU or a GPU.

    python -m benchmarks.compiled --cluster tpu-v4-32x2 configs/r50.yaml train.batch_size=8192
    python -m benchmarks.compiled --cluster slurm-4x8 configs/r50.yaml

The plan is the product's, and so are the mesh, the initialisation, the train step and the evaluation step. `make
compilers` installs the compilers. GPU nodes are H100s; choices that the GPU compiler makes by trial are those of no
real card. One column counts the collectives that stay within a slice, one those that leave it.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import starmap
from pathlib import Path

COMPILERS = Path(os.environ.get("COMPILERS", Path(sys.prefix) / "compilers"))
# https://www.nvidia.com/en-us/data-center/h100, and what its driver reports, in the form of XLA's GpuTargetConfig.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000 device_memory_size: 84929347584 l2_cache_size: 52428800
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
}
platform_name: "CUDA" device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 } runtime_version { major: 12 minor: 8 }
"""
BYTES = {"pred": 1, "u8": 1, "s8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "u64": 8, "s64": 8}
COLLECTIVE = re.compile(
    r" = (?P<shape>\(.*?\)|\S+) "
    r"(?P<op>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|send)(-start)?\((?P<rest>.*)"
)
COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[^\s(]+) \(.*\{$")
INSTRUCTION = re.compile(
    r"^ +(?:ROOT )?(?P<name>%\S+) = (?P<shape>\(.*?\)|\S+) (?P<op>[a-z][a-z0-9-]*)\((?P<rest>.*)"
)
FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "partition-id",
    "replica-id",
    "after-all",
)
"""Operations that move no bytes."""


@dataclass(frozen=True)
class Collective:
    """One collective of a compiled program."""

    op: str
    """`send` is a transfer out of a TPU slice, over the network between slices."""
    dtypes: list[str]
    bytes: int
    """Of its operands or results on one device, which for these operations are the larger of both."""
    groups: list[list[int]]
    """The devices that exchange, by their position in the mesh; empty where the program does not list them."""


@dataclass(frozen=True)
class Compiled:
    """One program, compiled for all devices."""

    program: str
    compile_seconds: float
    collectives: list[Collective]
    argument_bytes: int
    """Memory of one device, as for the following three."""
    output_bytes: int
    donated_bytes: int
    """Part of the arguments whose memory becomes that of results."""
    temporary_bytes: int
    accessed_bytes: float | None
    """Bytes that all operations of one device read and write; None where the compiler does not tell, as for GPUs."""
    counted_bytes: int
    """The same, as the text of the program has it: see `counted_bytes`."""


def prepare_environment() -> None:
    """Before jax is imported: it must find the compilers, and must not look for devices."""
    if not COMPILERS.is_dir():
        raise SystemExit(f"{COMPILERS} does not exist; install the compilers with `make compilers`")
    sys.path.append(str(COMPILERS))  # jax finds plugins on it
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "TPU_LIBRARY_PATH": str(COMPILERS / "libtpu" / "libtpu.so"),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0",
        "PATH": f"{COMPILERS / 'nvidia' / 'cuda_nvcc' / 'bin'}:{os.environ['PATH']}",
    }


def devices_of(cluster: str) -> list:
    """The devices of a cluster that is not there."""
    from jax.experimental import topologies

    from launcher.accelerators import parse_tpu

    if slurm := re.fullmatch(r"slurm-(\d+)x(\d+)", cluster):
        topology = f"{slurm[1]}x1x{slurm[2]}"
        return list(
            topologies.get_topology_desc("h100", "cuda", topology=topology, target_config=H100).devices
        )
    tpu, num_slices = parse_tpu(cluster.removeprefix("tpu-"))
    os.environ["TPU_ACCELERATOR_TYPE"] = tpu.accelerator_type
    # A v4 or v5p chip of two cores is one device.
    options = {"chip_config_name": "megacore"} if tpu.generation.name in ("v4", "v5p") else {}
    topology = topologies.get_topology_desc(
        f"{tpu.generation.name}:{tpu.topology}",
        "tpu",
        chips_per_host_bounds=(2, tpu.chips_per_vm // 2, 1),
        num_slices=num_slices,
        **options,
    )
    return list(topology.devices)


def compiled_programs(cluster: str, recipe: Path, overrides: list[str]) -> Iterator[Compiled]:
    """Plan the recipe for the cluster and compile what its workers would: initialisation, train and evaluation step."""
    import jax

    from configs.load import load
    from launcher.clusters import resolve
    from launcher.plan import make_plan
    from trainer.mesh import make_mesh
    from trainer.state import Network, abstract_state, make_init, make_optimizer, make_schedule
    from trainer.step import abstract_inputs, make_eval_step, make_train_step

    root = "gs://bucket/runs" if cluster.startswith("tpu") else "runs"
    plan = make_plan(
        load(recipe, ["data.source=synthetic", *overrides]),  # no data is read
        resolve(cluster),
        name="compiled",
        root=root,
        config_file=recipe,
        provenance={},
    )
    config, devices = plan.run_config(), devices_of(cluster)
    mesh = make_mesh(config.mesh.batch, config.mesh.model, devices)
    network = Network(config.model)
    schedule = make_schedule(
        config.schedule,
        config.optimizer.learning_rate,
        steps=plan.steps,
        steps_per_epoch=plan.steps_per_epoch,
    )
    optimizer = make_optimizer(config.optimizer, schedule, config.train.clip_norm)
    abstract = abstract_state(config, network, optimizer, mesh)
    weights, inputs = abstract.eval_weights(), abstract_inputs(config, mesh)
    train_step = make_train_step(config, network, optimizer, schedule, abstract, mesh)
    for program, function, arguments in (
        ("init", make_init(config, network, optimizer, abstract, mesh), ()),
        ("train", train_step, (jax.tree.leaves(abstract), *inputs)),
        ("eval", make_eval_step(config, network, weights, mesh), (jax.tree.leaves(weights), *inputs)),
    ):
        begun = time.perf_counter()
        compiled = function.lower(*arguments).compile()
        seconds = time.perf_counter() - begun
        memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis() or {}, compiled.as_text()
        yield Compiled(
            program=program,
            compile_seconds=round(seconds, 1),
            collectives=list(collectives_of(text)),
            argument_bytes=memory.argument_size_in_bytes,
            output_bytes=memory.output_size_in_bytes,
            donated_bytes=memory.alias_size_in_bytes,
            temporary_bytes=memory.temp_size_in_bytes,
            accessed_bytes=cost.get("bytes accessed"),
            counted_bytes=counted_bytes(text),
        )


def collectives_of(text: str) -> Iterator[Collective]:
    """The collectives in the text of a compiled program (https://openxla.org/xla/operation_semantics)."""
    for match in filter(None, map(COLLECTIVE.search, text.splitlines())):
        arrays = [(d, dims) for d, dims in re.findall(r"(\w+)\[([\d,]*)\]", match["shape"]) if d in BYTES]
        if match["op"] == "send":
            arrays = arrays[:1]  # the others are the context of the transfer
        yield Collective(
            op=match["op"],
            dtypes=sorted({dtype for dtype, _ in arrays}),
            bytes=sum(starmap(_size, arrays)),
            groups=_groups(match["rest"]),
        )


def counted_bytes(text: str) -> int:
    """Bytes that one run of a compiled program reads and writes: operands plus results of all that it executes.

    An operation that reads a part of its operand is counted with the whole; what stays in a cache is counted, too.
    """
    computations: dict[str, list[re.Match[str]]] = {}
    name = entry = ""
    for line in text.splitlines():
        if header := COMPUTATION.match(line):
            name = header["name"]
            entry = name if header["entry"] else entry
            computations[name] = []
        elif instruction := INSTRUCTION.match(line):
            computations[name].append(instruction)
    return _bytes_of(entry, computations)


def _bytes_of(computation: str, computations: dict[str, list[re.Match[str]]]) -> int:
    sizes: dict[str, int] = {}
    total = 0
    for instruction in computations[computation]:
        op, rest, shape = instruction["op"], instruction["rest"], instruction["shape"]
        if (
            op == "custom-call"
        ):  # without the workspace of cuDNN or cuBLAS, of which nobody knows what they use
            shape = re.sub(r", [su]8\[\d+\]\{0\}\)$", ")", shape)
        size = sum(starmap(_size, re.findall(r"(\w+)\[([\d,]*)\]", shape)))
        sizes[instruction["name"]] = size
        if op in ("call", "while"):  # as of a CUDA graph, or of micro-batches
            body = re.search(r"(?:to_apply|body)=%?([^\s,]+)", rest)
            times = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
            assert body is not None
            total += _bytes_of(body[1], computations) * (int(times[1]) if times else 1)
        elif op.endswith("-done"):  # where an asynchronous operation ends, it has read what it has written
            total += 2 * size
        elif op not in FREE and not op.endswith("-start"):
            operands = re.findall(r"%[^\s,()]+", rest.split("), ")[0])
            total += size + sum(sizes.get(operand, 0) for operand in operands)
    return total


def _size(dtype: str, dims: str) -> int:
    return BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)


def _groups(text: str) -> list[list[int]]:
    found = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", text)
    return (
        [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", found[1])]
        if found
        else []
    )


def _row(c: Compiled) -> list[str]:
    sent = [x for x in c.collectives if x.op == "send"]
    within = [x for x in c.collectives if x.op != "send"]
    mib = 2**20
    accessed = f"{(c.counted_bytes if c.accessed_bytes is None else c.accessed_bytes) / 1e9:.1f}"
    return [
        c.program,
        f"{c.compile_seconds:.0f}",
        f"{c.argument_bytes / mib:.0f}",
        f"{c.donated_bytes / mib:.0f}",
        f"{c.temporary_bytes / mib:,.0f}",
        accessed,
        f"{len(within)} ({sum(x.bytes for x in within) / mib:.1f})",
        f"{len(sent)} ({sum(x.bytes for x in sent) / mib:.2f})",
        " ".join(sorted({dtype for x in c.collectives for dtype in x.dtypes})),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cluster", required=True, help="tpu-GEN-SIZE or slurm-NxG")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each program")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    prepare_environment()
    rows = []
    for compiled in compiled_programs(arguments.cluster, arguments.recipe, arguments.overrides):
        if arguments.json:
            print(json.dumps(asdict(compiled)), flush=True)
        rows.append(_row(compiled))
    if not arguments.json:
        from benchmarks._common import print_table

        header = ["program", "compile s", "arguments MiB", "donated MiB", "temporary MiB", "accessed GB",
                  "collectives (MiB)", "out of the slice (MiB)", "dtypes"]  # fmt: skip
        print_table(header, rows)


if __name__ == "__main__":
    main()
