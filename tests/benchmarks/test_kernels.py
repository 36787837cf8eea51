"""Kernels by kind, with names from traces of real GPUs, and traces read: one of a GPU in protobuf's text, one made here."""

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from benchmarks._kernels import _kernels, idle_share, kernels_of, kind_of, summary

XMMA = "nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1_execute_segment_k_off_kernel__5x_cudnn"
REAL = {
    # cuDNN, as in traces of A100, H100 and B200
    f"sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_{XMMA}": "convolution",
    f"sm80_xmma_wgrad_implicit_gemm_indexed_bf16bf16_bf16f32_f32_{XMMA}": "convolution",
    f"sm80_xmma_dgrad_implicit_gemm_indexed_f16f16_f16f32_f32_{XMMA}": "convolution",
    "cutlass3x_sm100_tensorop_s256x256x16implicit_gemm_fprop_bf16": "convolution",
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x128_32x5_nhwc_align8>": "convolution",
    "void cudnn::detail::implicit_convolve_sgemm<float, float, int=128, int=5>": "convolution",
    "void cask_cudnn::first_layer_fwd_kernel<int=4, int=7, int=7, int=64>(cask_cudnn::FirstLayerFwdParams)": "convolution",
    "void conv2d_c1_k1_nhwc_kernel_specialized<__half>": "convolution",
    "void nhwcToNchwKernel<float, float, float, bool=1, bool=0>(int, int, int, int, float const *, float*)": "copies and transposes",
    "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>": "copies and transposes",
    "void cudnn::bn_fw_tr_1C11_kernel_NCHW<__half, float, 512, true, 1, true>": "batch norm",
    # cuBLAS
    "nvjet_tst_128x96_64x7_4x1_v_bz_bias_TNT": "matmul",
    "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_tn": "matmul",
    "void splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": "matmul",
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "communication",
    # what XLA generates: the program of ResNet-50 on an H100 has all of these
    "gemm_fusion_dot_265": "matmul",
    "input_reduce_fusion_92": "reductions",
    "input_add_reduce_fusion_12": "reductions",
    "input_reduce_select_fusion_3": "reductions",
    "loop_reduce_fusion_7": "reductions",
    "input_scatter_fusion": "pooling",
    "loop_reduce_window_fusion": "pooling",
    "loop_multiply_fusion_1": "elementwise",
    "loop_maximum_fusion_44": "elementwise",
    "loop_select_fusion_2": "elementwise",
    "loop_convert_fusion_1": "elementwise",
    "wrapped_slice_2": "elementwise",
    "input_transpose_fusion_52": "copies and transposes",
    "input_convert_transpose_fusion_4": "copies and transposes",
    "copy_107": "copies and transposes",
    "MemcpyD2D": "copies and transposes",
    "void something_new<float>": "other",
}  # fmt: skip
# As the profiler writes a GPU's kernels: a line for each stream. Times are in picoseconds after the line's beginning.
GPU = """
planes {
  name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "input_reduce_fusion_92" } }
  event_metadata { key: 2 value { id: 2 name: "nvjet_tst_128x96_64x7_4x1_v_bz_TNT" } }
  event_metadata { key: 3 value { id: 3 name: "MemcpyH2D" } }
  event_metadata { key: 4 value { id: 4 name: "jit_step" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  stat_metadata { key: 2 value { id: 2 name: "cudnn-conv-bw-input.7" } }
  lines { id: 1 name: "Stream #13(Kernel)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 4000000 }
    events { metadata_id: 2 offset_ps: 6000000 duration_ps: 2000000 stats { metadata_id: 1 ref_value: 2 } } }
  lines { id: 2 name: "Stream #14(MemcpyH2D)" timestamp_ns: 1000
    events { metadata_id: 3 offset_ps: 3000000 duration_ps: 2000000 } }
  lines { id: 3 name: "XLA Modules" timestamp_ns: 1000
    events { metadata_id: 4 offset_ps: 0 duration_ps: 8000000 } }
}
planes { name: "/host:CPU" lines { id: 4 name: "python" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 9000000 } } }
"""


@pytest.mark.parametrize(("name", "kind"), REAL.items(), ids=list(REAL))
def test_kind_of_a_real_kernel(name, kind):
    assert kind_of(name) == kind


def test_a_matrix_product_that_a_convolution_called_is_a_convolution():
    assert kind_of("nvjet_tst_128x96_64x7_4x1_v_bz_TNT", "cudnn-conv-bw-filter.3") == "convolution"
    assert kind_of("void cudnn::ops::nchwToNhwcKernel<float>", "cudnn-conv.3") == "copies and transposes"


def test_the_trace_of_a_gpu_is_read_by_streams():
    profile = ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(GPU))
    kernels = sorted(_kernels(profile), key=lambda kernel: kernel.begun_ns)
    assert [kernel.kind for kernel in kernels] == ["reductions", "copies and transposes", "convolution"]
    assert sum(kernel.seconds for kernel in kernels) == pytest.approx(8e-6)
    assert idle_share(kernels) == pytest.approx(1 / 8)  # one of the eight µs; the copy ran beside a kernel
    figures = summary(kernels, steps=2)
    assert figures["kernel_ms"] == {"reductions": 0.002, "copies and transposes": 0.001, "convolution": 0.001}


def test_the_trace_of_a_cpu_has_the_operations_of_the_program(tmp_path):
    convolve = jax.jit(
        lambda x, w: jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    )
    x, w = jnp.ones((8, 32, 32, 8)), jnp.ones((3, 3, 8, 8))
    convolve(x, w).block_until_ready()
    with jax.profiler.trace(tmp_path):
        convolve(x, w).block_until_ready()
    kernels = kernels_of(tmp_path)
    assert "convolution" in {kernel.kind for kernel in kernels}
    assert 0 <= idle_share(kernels) < 1


def test_a_trace_without_kernels_says_so(tmp_path):
    (tmp_path / "host.xplane.pb").write_bytes(b"")
    with pytest.raises(RuntimeError, match="the trace has no kernels"):
        kernels_of(tmp_path)
