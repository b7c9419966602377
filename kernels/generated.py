"""Generate Inductor's GPU kernels for FlexAttention on a machine without a GPU.

    with pretend(90, run) as kernels:
        attend = torch.compile(flex_attention, dynamic=True, backend=lower)
        out = attend(query, key, value, ...)  # CPU tensors, with gradients

AOTAutograd traces forward and backward on CPU tensors, as usual. `lower` then moves both graphs to
a nominal CUDA device, for which Inductor lowers them: templates, tiles and index arithmetic are
those that the GPU would run. The wrapper code around the kernels runs on CPU tensors. `run`
replaces kernel launches: Triton's interpreter in tests, nothing where only sources matter.

Works with CPU and CUDA builds of torch 2.11 and 2.13. It patches private parts of PyTorch, inside
the block only, for tests and `rrhf_fast.kernels.report`.
"""

import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo.device_interface
import torch._inductor.config
import torch.nn.attention.flex_attention
from torch._inductor import async_compile, compile_fx
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _triton
from torch.utils._pytree import tree_map_only

CUDA = torch.device("cuda", 0)
# Bytes of shared memory available to one program, by compute capability.
SHARED_LIMITS = {
    capability: kilobytes * 1024
    for capability, kilobytes in ((80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99))
}
# Each takes a kernel's function and Inductor's metadata; only the latter is needed here.
HEURISTICS = ("template", "pointwise", "reduction", "persistent_reduction")


@dataclass(frozen=True)
class Kernel:
    """One generated kernel."""

    name: str
    source: str  # a module that defines a function of this name
    function: Any  # that function, a triton.JITFunction
    info: dict  # metadata passed to Inductor's heuristic: warps, stages, signature, ...

    @property
    def is_template(self) -> bool:
        """Whether it computes attention itself, rather than operations around it."""
        return "triton_tem" in self.name


Run = Callable[..., None]  # (kernel, *launch arguments)


@contextmanager
def pretend(capability: int, run: Run = lambda kernel, *arguments: None) -> Iterator[list[Kernel]]:
    """Inside, Inductor compiles for a GPU of this compute capability (90 for 9.0). Yields the list
    to which generated kernels are added."""
    kernels: list[Kernel] = []

    def load(_, name: str, source: str, device_str: str = "cuda") -> SimpleNamespace:
        kernels.append(_load(name, source))
        kernel = kernels[-1]
        return SimpleNamespace(run=lambda *arguments, stream: run(kernel, *arguments))

    properties = _properties(capability)
    interface = torch._dynamo.device_interface.CudaInterface
    flex = torch.nn.attention.flex_attention
    flex_operator = sys.modules["torch._higher_order_ops.flex_attention"]
    guards = torch._C._dynamo.guards
    patches = [
        # The GPU's properties.
        (torch.cuda, "get_device_capability", lambda *_: divmod(capability, 10)),
        (torch.cuda, "get_device_properties", lambda *_: properties),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device_count", lambda: 1),
        (interface, "is_available", staticmethod(lambda: True)),
        (interface, "current_device", staticmethod(lambda: 0)),
        (interface, "get_compute_capability", staticmethod(lambda *_: capability)),
        (interface, "get_device_properties", staticmethod(lambda *_: properties)),
        (interface.Worker, "get_device_properties", staticmethod(lambda *_: properties)),
        (interface.Worker, "current_device", staticmethod(lambda: 0)),
        (_triton, "triton_hash_with_backend", lambda: ""),
        (compile_fx, "_check_triton_bf16_support", lambda graph: None),
        # Operations that FlexAttention rejects on the CPU, where it is traced.
        (flex, "_validate_device", lambda *_: None),
        (flex, "_apply_kernel_options", _with_logsumexp(flex._apply_kernel_options)),
        (flex_operator, "_permute_strides", _without_copy(flex_operator._permute_strides)),
        # Device calls in the wrapper code around the kernels.
        (torch.cuda, "_DeviceGuard", lambda _: nullcontext()),
        (torch.cuda, "set_device", lambda _: None),
        (torch._C, "_cuda_getCurrentRawStream", lambda _: 0),
        (guards, "_empty_strided_cuda", guards._empty_strided_cpu),
        # Loading and launching of kernels.
        (async_compile.AsyncCompile, "triton", load),
        (triton_helpers, "set_driver_to_gpu", lambda: None),
        *((triton_heuristics, name, _only_info) for name in HEURISTICS),
    ]
    # Cached facts about the machine.
    caches = (_triton.has_triton, DeviceProperties.create.__func__)
    with ExitStack() as stack:
        for cache in caches:
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        for owner, name, value in patches:
            # create: a CPU build of torch has no streams.
            stack.enter_context(patch.object(owner, name, value, create=True))
        stack.enter_context(
            torch._inductor.config.patch(compile_threads=1, force_disable_caches=True)
        )
        yield kernels


def lower(graph: torch.fx.GraphModule, inputs: list) -> Callable:
    """A backend for torch.compile: Inductor, with all tensors treated as CUDA tensors."""
    return compile_fx.compile_fx(graph, inputs, inner_compile=_lower_on_cuda)


def _lower_on_cuda(graph: torch.fx.GraphModule, inputs: list, **options) -> Callable:
    tree_map_only(FakeTensor, _move, inputs)
    for module in graph.modules():  # score and mask modifications are separate graphs
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            tree_map_only(FakeTensor, _move, list(node.meta.values()))
            node.args, node.kwargs = tree_map_only(
                torch.device, lambda _: CUDA, (node.args, node.kwargs)
            )
    return compile_fx.compile_fx_inner(graph, inputs, **options)


def _move(tensor: FakeTensor) -> FakeTensor:
    tensor.fake_device = CUDA
    return tensor


def _properties(capability: int) -> SimpleNamespace:
    """The properties of an H100, except those that code generation depends on."""
    shared = SHARED_LIMITS[capability]
    return SimpleNamespace(
        name="none", major=capability // 10, minor=capability % 10, multi_processor_count=132,
        total_memory=80 * 2**30, L2_cache_size=50 * 2**20, warp_size=32, gcnArchName="",
        regs_per_multiprocessor=65_536, max_threads_per_block=1024,
        max_threads_per_multi_processor=2048, shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=shared, shared_memory_per_multiprocessor=shared,
    )  # fmt: skip


def _with_logsumexp(apply_options: Callable) -> Callable:
    """Request the log-sum-exp, which the backward needs on CUDA; FlexAttention expects no backward
    on the CPU."""

    def apply(*arguments, **options):
        kernel_options = apply_options(*arguments, **options)
        kernel_options["OUTPUT_LOGSUMEXP"] |= torch.is_grad_enabled()
        return kernel_options

    return apply


def _without_copy(permute_strides: Callable) -> Callable:
    """Skip the copy of fake tensors, which would access the device."""

    def permute(out: torch.Tensor, strides: list) -> torch.Tensor:
        if not isinstance(out, FakeTensor):
            return permute_strides(out, strides)
        with patch.object(torch.Tensor, "copy_", lambda to, _: to):
            return permute_strides(out, strides)

    return permute


def _only_info(*_, **info) -> Callable:
    return lambda function: SimpleNamespace(function=function, info=info)


def _load(name: str, source: str) -> Kernel:
    # Triton gets the source from inspect, which reads linecache.
    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    module = {"__name__": name, "__file__": file}
    exec(compile(source, file, "exec"), module)
    kernel = module[name]
    return Kernel(name, source, kernel.function, kernel.info)
