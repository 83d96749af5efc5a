"""A double of one NVIDIA GPU: CUDA's runtime and TensorRT as the engine sees them, executing on the host.

`Machine().cuda` stands for the module `cuda.bindings.runtime`, `Machine().trt` for `tensorrt`; names, arguments and
results are theirs (tests/tensorrt/test_api_names.py compares them). An "engine file" is JSON that names a step graph;
the execution context runs that graph with ONNX Runtime. The double proves nothing about speed or about what TensorRT
computes: it proves that whoever uses it keeps these rules, and raises `Broken` when one is not kept. Device memory has
addresses that no host code can read. Work in the stream happens only when the host waits, so what is read too early is
not there yet.
"""

from __future__ import annotations

RUNTIME = "https://docs.nvidia.com/cuda/cuda-runtime-api"
TENSORRT = "https://docs.nvidia.com/deeplearning/tensorrt/latest"

RULES = {
    "static capacity": (
        "The sequence dimension of a KV cache is fixed in the engine, as are other sizes that its profiles do not name",
        f"{TENSORRT}/_static/operators/KVCacheUpdate.html",
    ),
    "profile": (
        "Every input has a shape, and it lies within the context's optimisation profile",
        f"{TENSORRT}/_static/python-api/infer/Core/ExecutionContext.html set_input_shape",
    ),
    "profile first": (
        "A change of profile forgets the shapes: they are set after it, in the same stream",
        "NvInferRuntime.h, IExecutionContext::setOptimizationProfileAsync",
    ),
    "addresses": (
        "Every input and output has an address before a pass is enqueued",
        "NvInferRuntime.h, IExecutionContext::enqueueV3",
    ),
    "in place": (
        "Present lies at its past's address where the engine updates in place, and apart from every past elsewhere",
        f"{TENSORRT}/_static/operators/KVCacheUpdate.html",
    ),
    "device memory": (
        "An address of the device lies in memory that was allocated, was not freed, and is large enough",
        f"{RUNTIME}/group__CUDART__MEMORY.html cudaMalloc, cudaFree",
    ),
    "aligned": (
        "The address of a tensor is a multiple of 256 bytes",
        "NvInferRuntime.h, IExecutionContext::setTensorAddress",
    ),
    "pinned": (
        "The host's side of an asynchronous copy is page-locked memory that was not freed",
        f"{RUNTIME}/api-sync-behavior.html",
    ),
    "untouched": (
        "Host memory that a copy reads or writes is left alone until the stream has passed",
        f"{RUNTIME}/api-sync-behavior.html",
    ),
    "written": (
        "No pass reads floats of the device that nobody wrote: in a KV cache they could be NaN, and a mask adds",
        f"{RUNTIME}/group__CUDART__MEMORY.html cudaMalloc: the memory is not cleared",
    ),
    "activations": (
        "A context that manages no memory of its own is given device memory of the engine's size",
        "NvInferRuntime.h, IExecutionContext::setDeviceMemoryV2",
    ),
    "one before capture": (
        "A context has run once with its shapes before it is captured",
        "NVIDIA/TensorRT samples/common/sampleInference.cpp; developer guide, CUDA graphs",
    ),
    "unchanged graph": (
        "A graph is launched only while its context, shapes and addresses are those that were captured",
        "developer guide, CUDA graphs: shapes that change ask for another capture",
    ),
    "nothing else in capture": (
        "While a stream is captured nothing is allocated, freed, or waited for",
        f"{RUNTIME}/group__CUDART__STREAM.html cudaStreamBeginCapture; CUDA programming guide, prohibited operations",
    ),
    "stream": (
        "Work is put in a stream that exists, and not in the default one, which cannot be captured",
        "NvInferRuntime.h, IExecutionContext::enqueueV3; CUDA programming guide, stream capture",
    ),
    "budget first": (
        "The budget of streamed weights is set while the engine has no context",
        "NvInferRuntime.h, ICudaEngine::setWeightStreamingBudgetV2",
    ),
    "all given back": (
        "At the end no memory, stream, graph, context, engine or runtime is left",
        f"{RUNTIME}/group__CUDART__MEMORY.html cudaFree, cudaFreeHost",
    ),
}
"""{rule: (what it says, where that is written)}"""


class Broken(AssertionError):
    """A rule was not kept."""

    def __init__(self, rule: str, what: str) -> None:
        assert rule in RULES, rule
        super().__init__(f"{rule}: {what}")
        self.rule = rule
