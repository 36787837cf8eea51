"""Bytes of a compiled program, counted from its text: the text is that of XLA's GPU compiler, shortened."""

from benchmarks.compiled import counted_bytes

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused_computation (p.1: f32[256]) -> bf16[256] {
  %p.1 = f32[256]{0} parameter(0)
  ROOT %convert.9 = bf16[256]{0} convert(%p.1)
}

%body.1 (p.2: (s32[], f32[64])) -> (s32[], f32[64]) {
  %p.2 = (s32[], f32[64]{0}) parameter(0)
  %get-tuple-element.5 = f32[64]{0} get-tuple-element(%p.2), index=1
  %copy.5 = f32[64]{0} copy(%get-tuple-element.5)
  ROOT %tuple.5 = (s32[], f32[64]{0}) tuple(%get-tuple-element.5, %copy.5)
}

%command_buffer (p.3: bf16[256]) -> bf16[256] {
  %p.3 = bf16[256]{0} parameter(0)
  ROOT %wrapped_negate = bf16[256]{0} fusion(%p.3), kind=kLoop, calls=%fused_computation
}

ENTRY %main.600_spmd (param: f32[256], param.1: bf16[8,32]) -> bf16[256] {
  %param = f32[256]{0} parameter(0)
  %param.1 = bf16[8,32]{1,0} parameter(1), sharding={devices=[8,1]<=[8]}
  %constant_1 = f32[] constant(0.5)
  %loop_convert_fusion = bf16[256]{0} fusion(%param, %constant_1), kind=kLoop, calls=%fused_computation, metadata={op_name="jit(step)/f(x), y"}
  %cudnn-conv.1 = (bf16[8,32]{1,0}, u8[33554432]{0}) custom-call(%loop_convert_fusion, %param.1), custom_call_target="__cudnn$convForward"
  %get-tuple-element.1 = bf16[8,32]{1,0} get-tuple-element(%cudnn-conv.1), index=0
  %bitcast.1 = bf16[256]{0} bitcast(%get-tuple-element.1)
  %all-reduce-start = bf16[256]{0} all-reduce-start(%bitcast.1), channel_id=2, to_apply=%fused_computation
  %all-reduce-done = bf16[256]{0} all-reduce-done(%all-reduce-start)
  %tuple.6 = (s32[], f32[64]{0}) tuple(%constant_1, %param)
  %while.1 = (s32[], f32[64]{0}) while(%tuple.6), condition=%cond.1, body=%body.1, backend_config={"known_trip_count":{"n":"4"}}
  ROOT %call = bf16[256]{0} call(%all-reduce-done), to_apply=%command_buffer
}
"""


def test_operands_and_results_of_all_that_runs_are_counted():
    fusion = 4 * 256 + 4 + 2 * 256  # what it does inside does not reach memory
    convolution = 2 * 256 + 2 * 256 + 2 * 256  # without its workspace
    all_reduce = 2 * 2 * 256
    micro_batches = 4 * 2 * (4 * 64)
    cuda_graph = 2 * 2 * 256
    assert counted_bytes(PROGRAM) == fusion + convolution + all_reduce + micro_batches + cuda_graph
