"""Numbers to codes: weights that are quantized while they are loaded."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from kernels.quantized import FP8, FP8_MAX, INT4_ZERO, Format, QuantizedWeight, pack_int4
from kernels.weights import match_shards

CHUNK_ELEMENTS = 1 << 24  # quantized at a time
MIN_SCALE = 1e-7  # float16 has no smaller one
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the range of a group's 4-bit codes: the one with the least squared error


class OnlineWeight(QuantizedWeight):
    """A matrix that a checkpoint holds as plain numbers, as codes. A rank's groups are of its own inputs."""

    has_files_groups = False

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for field, tensor in self.fields.items():
            yield "weight" if field == "codes" else "", tensor

    def place(self, name: str, loaded: torch.Tensor, part: int) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG002
        """Quantize this rank's slice of `loaded`, put its scales in place, and return (target, source) of the codes."""
        rows, columns = self.row_slice(part), self.input_shard
        whole = torch.empty(rows.stop - rows.start, self.k, device="meta")
        _, source = match_shards(whole, loaded, (self.parts[part].shard, columns))
        codes = self.codes[rows]
        size = max(1, CHUNK_ELEMENTS // self.k)
        made = []
        for start in range(0, len(source), size):
            chunk = source[start : start + size].to(codes.device).float()
            fields = quantize(self.form, chunk)
            made.append(fields.pop("codes"))
            for field, values in fields.items():
                self.fields[field][rows][start : start + size] = values
        return codes, made[0] if len(made) == 1 else torch.cat(made)


def quantize(form: Format, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the fields of `QuantizedWeight` nearest to float32 values [rows, k]: codes, scale, maybe zero.

    A group's scale is its largest magnitude over the largest code, or its range over all codes where there are zeros.
    """
    k = values.shape[1]
    group_size = form.group_size_of(k)
    groups = F.pad(values, (0, -k % group_size)).unflatten(1, (-1, group_size))
    if form.code == "fp8":
        scale = (groups.abs().amax(dim=2) / FP8_MAX).clamp_(min=MIN_SCALE).to(form.scale_dtype)
        codes = (groups / scale[:, :, None].float()).clamp_(-FP8_MAX, FP8_MAX).to(FP8)
        return {"codes": codes.flatten(1)[:, :k], "scale": scale}
    if form.code == "int8":
        scale = (groups.abs().amax(dim=2) / 127).clamp_(min=MIN_SCALE).to(form.scale_dtype)
        codes = (groups / scale[:, :, None].float()).round_().clamp_(-127, 127).to(torch.int8)
        return {"codes": codes.flatten(1)[:, :k], "scale": scale}
    best: dict[str, torch.Tensor] = {}
    for shrink in SHRINKS:
        fields = _quantize_int4(form, groups, shrink)
        zero = fields["zero"][:, :, None].float() if form.has_zero else INT4_ZERO
        error = ((fields["codes"] - zero) * fields["scale"][:, :, None].float() - groups).square_().sum(dim=2)
        if not best:
            best, least = fields, error
            continue
        is_better = error < least
        least = torch.where(is_better, error, least)
        for field, found in fields.items():
            chosen = is_better[:, :, None] if found.dim() == 3 else is_better
            best[field] = torch.where(chosen, found, best[field])
    return {**best, "codes": pack_int4(best["codes"].flatten(1)[:, :k])}


def _quantize_int4(form: Format, groups: torch.Tensor, shrink: float) -> dict[str, torch.Tensor]:
    """Return codes [rows, G, group] from 0 to 15, scale and maybe zero [rows, G], for a range shrunk by a factor."""
    if form.has_zero:
        low, high = groups.amin(dim=2).clamp_(max=0) * shrink, groups.amax(dim=2).clamp_(min=0) * shrink
        scale = ((high - low) / 15).clamp_(min=MIN_SCALE).to(form.scale_dtype)
        zero = (-low / scale.float()).round_().clamp_(0, 15)
        codes = (groups / scale[:, :, None].float()).round_() + zero[:, :, None]
        return {"codes": codes.clamp_(0, 15), "scale": scale, "zero": zero.to(torch.uint8)}
    scale = (groups.abs().amax(dim=2) * (shrink / 7.5)).clamp_(min=MIN_SCALE).to(form.scale_dtype)
    codes = (groups / scale[:, :, None].float()).round_() + INT4_ZERO
    return {"codes": codes.clamp_(0, 15), "scale": scale}
