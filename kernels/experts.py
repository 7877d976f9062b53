"""Products with the experts of a layer, whose weights are stacked row on row.

A pair is a token and one of its experts; pairs are numbered token by token, the best expert first. Where ranks share
out a layer's experts, ids are those of this rank's, and the number of these stands for any other rank's.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from kernels import fp4_experts
from kernels.dense import DenseWeight, has_onednn_units
from kernels.quantized import QuantizedWeight
from kernels.quantized_format import Format
from kernels.weights import Weight

if TYPE_CHECKING:
    from kernels.triton_experts import Codes, Sorted, Unsorted


class ExpertShape(NamedTuple):
    """The experts of a layer that a rank has, as one of its products uses them."""

    num_experts: int
    num_rows: int  # of an expert: of gate and up together, if there is an activation
    k: int
    act: str | None = None  # of gate and up
    form: Format | None = None  # None: plain numbers


def split_experts(stack: Weight, num_experts: int) -> list[Weight]:
    """Return the weight of each expert of a stack, as views of its tensors.

    NotImplementedError for formats that cannot be cut.
    """
    parts = stack.parts[: len(stack.parts) // num_experts]
    num_rows = stack.n // num_experts
    experts: list[Weight] = []
    for expert in range(num_experts):
        rows = slice(expert * num_rows, (expert + 1) * num_rows)
        if isinstance(stack, DenseWeight):
            data = stack.data[rows]
            experts.append(DenseWeight(parts, stack.k, data.dtype, stack.input_shard, data))
        elif isinstance(stack, QuantizedWeight):
            experts.append(stack.sliced(rows, parts))
        else:
            raise NotImplementedError(f"experts of {type(stack).__name__}")
    return experts


class ExpertStack:
    """The weights of a layer's experts, ready for products."""

    def __init__(self, stack: Weight, num_experts: int, num_on_all_ranks: int | None = None) -> None:
        """stack: loaded, not packed. num_on_all_ranks: experts of the layer, if ranks share them out.

        NotImplementedError if the device has no kernel for its format.
        """
        self.num_experts, self.num_on_all_ranks = num_experts, num_on_all_ranks or num_experts
        self.stack = stack
        self.experts: list[Weight] = []
        self.codes: Codes | None = None
        self.is_fp4 = False  # has kernels in `fp4_experts`
        if next(stack.tensors())[1].is_cuda:
            self.codes = codes_of(stack)
            self.is_fp4 = isinstance(stack, QuantizedWeight) and fp4_experts.can_multiply(self.codes, stack.dtype)
        else:
            self.experts = [_packed_in_place(expert) for expert in split_experts(stack, num_experts)]

    def sort(self, ids: torch.Tensor) -> "Sorted | Unsorted | None":
        """Return the pairs of ids [T, k] as both products of a step want them."""
        if not ids.is_cuda:
            return None
        from kernels import triton_experts  # here: a machine without a GPU need not have triton

        kernels = fp4_experts if self.is_fp4 else triton_experts
        height = kernels.tile_height(ids.numel(), self.num_on_all_ranks)
        if height is None:
            return None
        if not self.is_fp4 and len(ids) <= triton_experts.LOWEST_BLOCK:
            return triton_experts.Unsorted()
        return triton_experts.sort_pairs(ids, self.num_experts, height)

    def products(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        by_expert: "Sorted | Unsorted | None",
        act: str | None = None,
        bias: torch.Tensor | None = None,
        *,
        following: "ExpertStack | None" = None,
    ) -> torch.Tensor:
        """Return for each pair the product of its input with its expert's weight: [T k, n], or [T k, n / 2] with `act`.

        Of pairs whose expert another rank has it is zeros, on a GPU anything.

        x: [T, inputs], of tokens, or [T k, inputs], of pairs. by_expert: what `sort` returned for ids [T, k].
        bias: [E n], of all experts. following: the only stack that will take the result, for which it may lie as that
        one's kernel reads it: [T k, more].
        """
        if x.is_cuda:
            from kernels.triton_experts import Sorted, expert_products_triton
            from kernels.triton_quantized import rounded_values

            assert self.codes is not None
            if isinstance(self.stack, QuantizedWeight) and (form := self.stack.form).inputs is not None:
                known_scale = self.stack.fields.get("input_scale")
                x = rounded_values(x, to=form.inputs, group=form.input_group, known_scale=known_scale)
            if isinstance(by_expert, Sorted) and self.is_fp4 and act in fp4_experts.ACTS:
                is_input = following is not None and following.is_fp4
                return fp4_experts.multiply(
                    x, ids, self.codes, self.num_experts, act, by_expert, bias, is_input=is_input
                )
            is_shared_out = self.num_experts < self.num_on_all_ranks
            return expert_products_triton(
                x, ids, self.codes, self.num_experts, act, by_expert, bias, is_shared_out=is_shared_out
            )
        return expert_products_torch(x, ids, self.experts, act, bias)


def _packed_in_place(expert: Weight) -> Weight:
    """Return an expert in its CPU's layout, unless that is a copy: all experts of a layer are one tensor."""
    if isinstance(expert, DenseWeight) and has_onednn_units(expert.data.dtype):
        return expert
    return expert.pack()


def code_of(form: Format, k: int) -> str:
    """Return how the kernels read the codes of a format, in rows of k inputs."""
    return "fp4" if form.table == "fp4" and k % 8 == 0 else form.code


def codes_of(stack: Weight) -> "Codes":
    """Return a stack's tensors as the kernels read them. NotImplementedError for formats that they do not know."""
    from kernels.triton_experts import Codes

    if isinstance(stack, DenseWeight):
        return Codes(stack.data, stack.k)
    if not isinstance(stack, QuantizedWeight) or stack.form.has_order:
        raise NotImplementedError(f"experts of {type(stack).__name__} have no kernels for a GPU")
    stack.settle()
    form, fields, device = stack.form, stack.fields, stack.codes.device
    code = code_of(form, stack.k)
    table = stack.meanings.to(device) if form.table and code != "fp4" else None
    codes = stack.codes.view({"fp8": torch.uint8, "fp4": torch.int32}.get(code, stack.codes.dtype))
    return Codes(
        codes, stack.k, code, stack.scale, fields.get("zero"), fields.get("minimum"), table,
        form.group_size_of(stack.k), form.offset,
    )  # fmt: skip


def expert_products_torch(
    x: torch.Tensor,
    ids: torch.Tensor,
    experts: Sequence[Weight],
    act: str | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    num_tokens, top_k = ids.shape
    flat = ids.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=len(experts)).tolist()[: len(experts)]
    sources = order if len(x) == len(flat) else order // top_k
    n = experts[0].n if act is None else experts[0].n // 2
    biases = [None] * len(experts) if bias is None else bias.view(len(experts), -1).unbind()
    out = x.new_empty(num_tokens * top_k, n)
    start = 0
    for expert, count in enumerate(counts):
        if count:
            pairs = slice(start, start + count)
            out[order[pairs]] = experts[expert].product(x[sources[pairs]], bias=biases[expert], act=act)
            start += count
    if start < len(order):
        out[order[start:]] = 0
    return out


def combine_torch(products: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    of_tokens = products.view(*weights.shape, -1)
    total = of_tokens[:, 0].float() * weights[:, :1]
    for i in range(1, weights.shape[1]):
        total += of_tokens[:, i].float() * weights[:, i : i + 1]
    return total


def combine(
    products: torch.Tensor, weights: torch.Tensor, residual: torch.Tensor | None = None, *, has_gaps: bool = False
) -> torch.Tensor:
    """Return residual + the weighted sum of each token's pairs: [T k, n] and [T, k] -> [T, n].

    Summed in float32, the best expert first, whatever else is in the step. has_gaps: products whose weight is 0
    may be anything.
    """
    if products.is_cuda:
        from kernels.triton_experts import combine_triton

        return combine_triton(products, weights, residual, has_gaps=has_gaps)
    total = combine_torch(products, weights)
    return (total if residual is None else total.add_(residual)).to(products.dtype)
