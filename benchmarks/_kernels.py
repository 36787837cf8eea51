"""Time of an accelerator by kind of kernel, from a trace of jax's profiler: read for benchmarks/accelerator.py."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jax.profiler import ProfileData

# The first that matches the name of a kernel, in lower case. XLA names a kernel that it generates after the root of
# its fusion and what feeds it (`input_reduce_fusion`); cuDNN, CUTLASS, cuBLAS and NCCL have names of their own.
KINDS = {
    "communication": r"nccl|all.?reduce|all.?gather|reduce.?scatter(?!_fusion)|collective",
    "pooling": r"select_and_scatter|reduce.?window|scatter_fusion|max_?pool|pooling",
    "copies and transposes": r"nchw_?to_?nhwc|nhwc_?to_?nchw|transpose|copy|memcpy|memset",
    "batch norm": r"bn_fw|bn_bw|batch_?norm|welford",
    "convolution": r"fprop|dgrad|wgrad|implicit_gemm|implicit_convolve|winograd|conv(?!ert)|cudnn",
    "matmul": r"gemm|nvjet|cublas|cutlass|splitk|\bdot|_dot",
    "reductions": r"reduc",
    "elementwise": r"^loop_|^wrapped_|^input_|^fusion|^broadcast|fusion$|elementwise|triton_poi|multi_tensor_apply",
}
"""cuDNN does nothing else for us than what stands before it. Batch norm of jax is in the reductions, and fused into what is elementwise."""
OTHER = "other"


@dataclass(frozen=True)
class Kernel:
    name: str
    begun_ns: float
    seconds: float
    kind: str


def kind_of(kernel: str, instruction: str = "") -> str:
    """The kind of a kernel, by its name and by that of the XLA instruction that called it, where it is known."""
    name = kernel.lower()
    found = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), OTHER)
    # cuDNN computes a 1×1 convolution as a matrix product, and helps itself to small kernels without telling names.
    if found in ("matmul", "reductions", OTHER) and re.match(r"cudnn-conv", instruction):
        return "convolution"
    return found


def kernels_of(trace: Path) -> list[Kernel]:
    """All kernels of a trace folder, in the order of their beginning; on a CPU, XLA's operations."""
    (file,) = trace.glob("**/*.xplane.pb")
    kernels = sorted(_kernels(ProfileData.from_file(str(file))), key=lambda kernel: kernel.begun_ns)
    if not kernels:
        raise RuntimeError("the trace has no kernels: jax could not use CUPTI, NVIDIA's library for tracing")
    return kernels


def _kernels(profile: ProfileData) -> Iterator[Kernel]:
    planes = list(profile.planes)
    on_gpu = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in on_gpu or planes:
        for line in plane.lines:
            # A GPU's other lines repeat the same time by module and by operation.
            if on_gpu and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = {str(key): value for key, value in event.stats}
                instruction = str(stats.get("hlo_op", ""))
                if event.duration_ns and (on_gpu or instruction == event.name):
                    kind = kind_of(event.name, instruction)
                    yield Kernel(event.name, event.start_ns, event.duration_ns / 1e9, kind)


def idle_share(kernels: list[Kernel]) -> float:
    """Share of the time from the first kernel to the end of the last in which none ran, on whatever stream."""
    busy, reached = 0.0, kernels[0].begun_ns
    for kernel in kernels:
        ended = kernel.begun_ns + kernel.seconds * 1e9
        busy += max(0.0, ended - max(reached, kernel.begun_ns))
        reached = max(reached, ended)
    return 1 - busy / (reached - kernels[0].begun_ns)


def summary(kernels: list[Kernel], steps: int) -> dict[str, object]:
    """Milliseconds a step by kind, the ten kernels that take the most of them, and the idle share."""
    by_kind, by_name = Counter[str](), Counter[str]()
    for kernel in kernels:
        by_kind[kernel.kind] += kernel.seconds * 1e3 / steps
        by_name[kernel.name] += kernel.seconds * 1e3 / steps
    return {
        "kernel_ms": {kind: round(ms, 4) for kind, ms in by_kind.most_common()},
        "longest_ms": {name: round(ms, 4) for name, ms in by_name.most_common(10)},
        "idle_share": round(idle_share(kernels), 4),
    }
