"""Matrix products in a lower precision, and float32 ones by the fastest way torch has on a CPU.

torch takes float32 products on a CPU from MKL, which on AMD processors leaves AVX-512 unused. The
other library that torch carries, oneDNN, uses it: at CrossQ's sizes it takes 10-35 % less time.
torch gives it to those who let it round factors to bfloat16, which only processors with AMX do.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

WIDE = 512  # columns above which the compiler's sums over rows, a page apart at 1024, are slow
_LIBRARY = torch.library.Library("embodied_rl", "FRAGMENT")
_LIBRARY.define("round(Tensor x, ScalarType dtype) -> Tensor")
_LIBRARY.define("rounded_product(Tensor left, Tensor right, Tensor? bias) -> Tensor")


def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns x [B, I] @ weight^T [I, O] + bias [O], the product in `dtype`, gradients' too.

    Factors and result of each product are rounded to `dtype`; x and weight, the bias, what comes
    back and the gradients are float32.
    """
    return _RoundedLinear.apply(x, weight, bias, dtype)  # type: ignore[return-value]


class _RoundedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        native = torch.ops.embodied_rl if x.device.type == "cpu" else _Plain
        low_x, low_weight = native.round(x, dtype), native.round(weight, dtype)
        ctx.save_for_backward(low_x, low_weight)
        ctx.native, ctx.dtype = native, dtype
        return native.rounded_product(low_x, low_weight.t(), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        low_x, low_weight = ctx.saved_tensors
        to_x, to_weight, to_bias, _ = ctx.needs_input_grad
        (gradient,), native = gradients, ctx.native
        low = native.round(gradient, ctx.dtype)
        return (
            native.rounded_product(low, low_weight, None) if to_x else None,
            native.rounded_product(low.t(), low_x, None) if to_weight else None,
            gradient.sum(0) if to_bias else None,
            None,
        )


class _Plain:
    """What a GPU's compiler may fuse as it likes."""

    @staticmethod
    def round(x: Tensor, dtype: torch.dtype) -> Tensor:
        # whatever its strides, in the layout that `_rounded_shape` tells the compiler
        return x.to(dtype, memory_format=torch.contiguous_format)

    @staticmethod
    def rounded_product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        product = (left @ right).float()
        return product if bias is None else product.add_(bias)


@contextmanager
def by_onednn() -> Iterator[None]:
    """Float32 products on a CPU come from oneDNN, where it is faster and just as exact."""
    if not _onednn_helps():
        yield
        return
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined] - put there at import
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before


@functools.cache
def _onednn_helps() -> bool:
    """Whether this is a CPU with AVX-512 on which oneDNN keeps all 24 bits; bfloat16 has 8."""
    backend = torch.backends.mkldnn
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not backend.is_available():
        return False
    if not hasattr(backend, "matmul"):
        return False  # an earlier torch
    setting = backend.matmul  # type: ignore[attr-defined] - put there at import
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        longs = [torch.full((rows, inner), 1 + 2.0**-20) for rows, inner in ((64, 64), (256, 512))]
        ones = [torch.eye(long.shape[1]) for long in longs]
        turned = [long.t().contiguous().t() for long in longs]
        return all(
            torch.equal(left @ one, long)
            for long, other, one in zip(longs, turned, ones, strict=True)
            for left in (long, other)
        )
    finally:
        setting.fp32_precision = before


def _product_shape(left: Tensor, right: Tensor, _: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)


def _rounded_shape(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


# operations of their own on a CPU: left to Inductor, bias and conversions end in the same pass as
# the ReLU, which then keeps its mask as bytes: everything around it takes six times as long
_LIBRARY.impl("round", _Plain.round, "CPU")
_LIBRARY.impl("rounded_product", _Plain.rounded_product, "CPU")
torch.library.register_fake("embodied_rl::round", _rounded_shape)
torch.library.register_fake("embodied_rl::rounded_product", _product_shape)


def unfold_vectors(graph: fx.Graph) -> None:
    """Writes the float32 products of a CPU's graph that have a side of 1 as passes over elements.

    The compiler makes them part of the passes before and after; neither library has a fast way.
    """
    aten = torch.ops.aten
    for node in list(graph.nodes):
        if node.target is aten.mm.default:
            left, right, bias = *node.args, None
        elif node.target is aten.addmm.default and not node.kwargs:
            bias, left, right = node.args
        else:
            continue
        value = left.meta["val"]
        if value.device.type != "cpu" or value.dtype != torch.float32:
            continue
        rows, inner, columns = *value.shape, right.meta["val"].shape[1]
        if 1 not in (rows, inner, columns) or (rows == 1 and columns > WIDE):
            continue

        def call(function: Any, *args: Any) -> fx.Node:
            new = graph.call_function(function, args)
            new.meta["val"] = function(*fx.map_arg(args, lambda n: n.meta["val"]))
            return new

        with graph.inserting_before(node):
            if inner == 1:
                new = call(aten.mul.Tensor, left, right)
            elif columns == 1:
                row = call(aten.permute.default, right, [1, 0])
                new = call(aten.sum.dim_IntList, call(aten.mul.Tensor, left, row), [1], True)
            else:
                column = call(aten.permute.default, left, [1, 0])
                new = call(aten.sum.dim_IntList, call(aten.mul.Tensor, column, right), [0], True)
            if bias is not None:
                new = call(aten.add.Tensor, new, bias)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def fast_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16; true where nobody can tell."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return True  # not Linux
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())
