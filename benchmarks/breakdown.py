"""Where the time of a step goes on a CPU, by kind of operation.

`--profile` of the `step` case shows a step's parts and a trace; here the parts are split further,
so that products with weights stand alone, as in the limit (`benchmarks.limit`). The profiler makes
small operations slower, so shares matter more than seconds.
"""

import resource
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, record_function

from benchmarks.tables import text_table
from rrhf_fast.train.profile import STEPS, assign_parts

DECODER, HEAD = "decoder products", "head products"
HEAD_REST, NORMS = "head: softmax and loss", "norms and activations"
ATTENTION, GATHERS, COPIES = "attention", "gathers", "casts, copies, zeros"
SUMS, OPTIMIZER, ALLOCATOR = "sums of gradients", "optimizer", "allocator"
PACKS, PYTHON = "packs", "Python, autograd, views"
GROUPS = (
    DECODER, HEAD, HEAD_REST, ATTENTION, NORMS, GATHERS, COPIES, SUMS, OPTIMIZER, ALLOCATOR,
    PACKS, PYTHON,
)  # fmt: skip
# The part of the limit that bounds a group.
BOUNDS = {DECODER: "decoder", HEAD: "head", ATTENTION: "attention"}
ACCUMULATE = "torch::autograd::AccumulateGrad"
# Names of operators, without "aten::" and a trailing underscore, by group.
OPERATORS = {
    "products": ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"),
    GATHERS: (
        "index", "index_select", "index_put", "_index_put_impl", "index_add", "index_copy",
        "index_fill", "gather", "scatter", "scatter_add", "embedding", "embedding_dense_backward",
        "embedding_backward", "masked_select", "nonzero", "repeat_interleave", "take_along_dim",
    ),
    COPIES: ("copy", "_to_copy", "clone", "fill", "zero", "cat", "_foreach_copy", "_foreach_zero"),
    ALLOCATOR: ("empty", "empty_like", "empty_strided", "new_empty", "resize", "set",
                "new_empty_strided", "empty_permuted"),
    PYTHON: (
        "view", "reshape", "_reshape_alias", "as_strided", "slice", "select", "transpose", "t",
        "permute", "expand", "unsqueeze", "squeeze", "detach", "alias", "narrow", "split", "chunk",
        "unbind", "unflatten", "flatten", "view_as", "split_with_sizes", "to", "contiguous",
        "matmul", "linear", "zeros", "zeros_like", "ones", "ones_like", "new_zeros", "item",
        "_local_scalar_dense", "result_type", "lift_fresh", "resolve_conj", "resolve_neg",
        "slice_backward", "select_backward", "is_nonzero", "full", "full_like", "new_full",
        "_unsafe_view", "expand_as", "numpy_T", "unfold", "type_as",
    ),
}  # fmt: skip
_GROUP_OF = {name: group for group, names in OPERATORS.items() for name in names}


def measure(step: Callable[[], object], limit: dict, num_steps: int = 2) -> dict:
    """Run `step`, whose products `limit` (`limit.limit_of`) knows, once to warm up, then
    `num_steps` times under the profiler.

    Returns:
        Per step: `seconds` and `groups`, the main thread's own seconds by group, which add up to
        them; `at_peak`, what the groups of products would take at the peak; `operators`, the ten
        that take longest; `system_seconds`, CPU time in the kernel, and `page_faults`, both mostly
        for memory that the allocator has just got from the system: it is the operator that first
        writes there whose time they lengthen.
    """
    step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    with (
        torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profile,
        record_function(STEPS),
    ):
        for _ in range(num_steps):
            step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds, groups, operators = by_group(profile.events())
    return {
        "steps": num_steps,
        "seconds": seconds / num_steps,
        "at_peak": {group: limit["seconds"][part] for group, part in BOUNDS.items()},
        "groups": {name: groups[name] / num_steps for name in GROUPS if groups[name]},
        "operators": {name: spent / num_steps for name, spent in operators.most_common(10)},
        "system_seconds": (after.ru_stime - before.ru_stime) / num_steps,
        "page_faults": (after.ru_minflt - before.ru_minflt) / num_steps,
    }


def by_group(events: Iterable) -> tuple[float, Counter, Counter]:
    """Seconds from the first step's begin to the last one's end, and each group's and each
    operator's own on that thread, of a profiler whose steps are within a range `STEPS`."""
    events = sorted(events, key=lambda event: (event.time_range.start, -event.time_range.end))
    (steps,) = (event for event in events if event.name == STEPS)
    begin, end = steps.time_range.start, steps.time_range.end
    events = [event for event in events if begin <= event.time_range.start <= end]
    groups, operators = Counter(), Counter()
    for event, part in zip(events, assign_parts(events), strict=True):
        if event.thread == steps.thread:
            own = event.self_cpu_time_total / 1e6
            groups[_group(event, part)] += own
            operators[event.name] += own
    return (end - begin) / 1e6, groups, operators


def _group(event, part: str) -> str:
    """The group of an event that belongs to `part` of a step."""
    library, _, name = event.name.partition("::")
    if library not in ("aten", "mkldnn", "mkl", "onednn"):
        return PYTHON  # ranges, autograd's own work, functions in Python
    group = _GROUP_OF.get(name.removesuffix("_"), "")
    if name.startswith(("mkldnn_linear", "_linear", "_addmm", "_mkl_linear")):
        group = "products"
    if part == "optimizer":
        return OPTIMIZER
    if event.cpu_parent is not None and event.cpu_parent.name == ACCUMULATE:
        return SUMS
    if part == "data":
        return PACKS
    if group == "products" and part != "attention":
        return HEAD if part == "head" else DECODER
    if group in (ALLOCATOR, PYTHON):
        return group
    if part == "attention":
        return ATTENTION
    if group in (GATHERS, COPIES):
        return group
    return HEAD_REST if part in ("head", "loss") else NORMS


def table(breakdown: dict) -> str:
    """Each group's time, share and, for products, time at the peak."""
    total, at_peak = breakdown["seconds"], breakdown["at_peak"]
    rows = [
        [
            name,
            f"{spent:.3f}",
            f"{spent / total:.1%}",
            f"{at_peak[name]:.3f}" if name in at_peak else "",
        ]
        for name, spent in sorted(breakdown["groups"].items(), key=lambda item: -item[1])
    ]
    return "\n".join(
        [
            text_table(["a whole step, profiled", "s", "share", "s at the peak"], rows),
            f"{total:.3f} s per step, of which {breakdown['system_seconds']:.3f} CPU seconds in "
            f"the system ({breakdown['page_faults']:,.0f} page faults)",
        ]
    )
