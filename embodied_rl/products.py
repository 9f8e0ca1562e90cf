"""Matrix products in a lower precision, and by the faster of torch's two CPU libraries.

torch takes float32 products on a CPU from MKL, which on AMD processors leaves AVX-512 unused. The
other library that torch carries, oneDNN, uses it: at CrossQ's sizes it takes 10-35 % less time. No
setting of torch chooses it for float32, so a pass over compiled graphs does.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable

INNER, OUTER = 32, 20  # with smaller sides MKL is faster
_LIBRARY = torch.library.Library("embodied_rl", "FRAGMENT")
_LIBRARY.define("onednn_product(Tensor left, Tensor right, Tensor? bias) -> Tensor")
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


def _onednn_product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None and not left.is_contiguous() and _strided_is_exact():
        return _strided_product(left, right)
    return torch.ops.mkldnn._linear_pointwise.default(left, right.t(), bias, "none", [], "")


def _strided_product(left: Tensor, right: Tensor) -> Tensor:
    """By oneDNN with the left factor as it lies in memory; a linear layer's would copy it first.

    torch gives this way to those who let it round factors to bfloat16, which is done only by
    processors with AMX.
    """
    setting = torch.backends.mkldnn.matmul  # type: ignore[attr-defined] - put there at import
    before, setting.fp32_precision = setting.fp32_precision, "bf16"
    try:
        return left @ right
    finally:
        setting.fp32_precision = before


@functools.cache
def _strided_is_exact() -> bool:
    """Whether `_strided_product` keeps all 24 bits here; bfloat16 has 8."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        return False  # an earlier torch
    long = torch.full((64, 64), 1 + 2.0**-20)
    return torch.equal(_strided_product(long.t(), torch.eye(64)), long)


def _product_shape(left: Tensor, right: Tensor, _: Tensor | None) -> Tensor:
    return left.new_empty(left.shape[0], right.shape[1], dtype=torch.float32)


def _rounded_shape(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


# operations of their own on a CPU: left to Inductor, bias and conversions end in the same pass as
# the ReLU, which then keeps its mask as bytes: everything around it takes six times as long
_LIBRARY.impl("round", _Plain.round, "CPU")
_LIBRARY.impl("rounded_product", _Plain.rounded_product, "CPU")
_LIBRARY.impl("onednn_product", _onednn_product, "CPU")
torch.library.register_fake("embodied_rl::round", _rounded_shape)
torch.library.register_fake("embodied_rl::rounded_product", _product_shape)
torch.library.register_fake("embodied_rl::onednn_product", _product_shape)


def use_onednn(graph: fx.Graph) -> None:
    """Replaces the float32 products of a compiled graph, in place, where oneDNN is faster."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.mm.default:
            left, right, bias = *node.args, None
        elif node.target is torch.ops.aten.addmm.default and not node.kwargs:
            bias, left, right = node.args
        else:
            continue
        if not _faster(left.meta["val"], right.meta["val"], bias):
            continue
        product = torch.ops.embodied_rl.onednn_product.default
        with graph.inserting_before(node):
            new = graph.call_function(product, (left, right, bias))
        new.meta.update(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _faster(left: Tensor, right: Tensor, bias: fx.Node | None) -> bool:
    rows, inner, columns = *left.shape, right.shape[1]
    return (
        left.device.type == "cpu"
        and left.dtype == right.dtype == torch.float32
        and (bias is None or bias.meta["val"].dim() == 1)
        and inner >= INNER
        and min(rows, columns) >= OUTER
    )


def onednn_helps() -> bool:
    """Whether this is a CPU with AVX-512 and a torch with oneDNN."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkldnn.is_available()


def fast_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16; true where nobody can tell."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return True  # not Linux
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags.split())
