"""Rows of a name table: one leaf, the tensors that it is stacked from, and how a matrix lies in both."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One dim of a tensor seen with its groups apart, and the part of it that a leaf takes."""

    size: int
    start: int
    stop: int


@dataclass(frozen=True)
class Row:
    """One line of the table for one configuration: a leaf and the tensors that it is stacked from."""

    leaf: str
    """Path in the variables, such as `params/moe_layers/attention/w_uk`."""
    tensor: str
    """Name with `{layer}` and `{expert}` where the leaf is stacked over them."""
    rows: tuple[Axis, ...]
    """The tensor's first dim, groups apart."""
    cols: tuple[Axis, ...]
    """Its second dim; empty for a vector."""
    swapped: bool
    """Whether the leaf's dims are those of `cols`, then those of `rows`."""
    layers: tuple[int, ...] | None = None
    experts: int | None = None
    fp8: bool = False

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape on disk of each tensor."""
        shape = (math.prod(axis.size for axis in self.rows), math.prod(axis.size for axis in self.cols))
        return shape if self.cols else shape[:1]

    @property
    def lead(self) -> tuple[int, ...]:
        """The leaf's stacking dims: layers, experts, both or none."""
        layers = () if self.layers is None else (len(self.layers),)
        return layers if self.experts is None else (*layers, self.experts)

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Shape of the whole leaf."""
        axes = (*self.cols, *self.rows) if self.swapped else (*self.rows, *self.cols)
        return (*self.lead, *(axis.stop - axis.start for axis in axes))

    def name(self, *place: int) -> str:
        """Name of the tensor at this place of the stacking dims."""
        layer = self.layers[place[0]] if self.layers is not None else 0
        return self.tensor.format(layer=layer, expert=place[-1] if place else 0)

    def names(self) -> Iterator[tuple[tuple[int, ...], str]]:
        """(place in the stacking dims, tensor name) of every tensor, layer by layer."""
        for layer in range(len(self.layers) if self.layers is not None else 1):
            for expert in range(self.experts if self.experts is not None else 1):
                place = ((layer,) if self.layers is not None else ()) + ((expert,) if self.experts is not None else ())
                yield place, self.name(*place)


def make_row(
    leaf: str,
    tensor: str,
    pattern: str,
    sizes: Mapping[str, int],
    layers: tuple[int, ...] | None = None,
    experts: int | None = None,
    fp8: bool = False,
) -> Row:
    """A row from its pattern, such as `(N P+V) C -> C N P`, and the sizes of the letters in it.

    Left are the tensor's dims, groups in parentheses, parts that lie behind each other joined by `+`; right are the
    leaf's dims, which take a part, or all of them under its whole name.
    """
    left, right = (side.strip() for side in pattern.split("->"))
    dims = [dim.strip("()").split() for dim in re.findall(r"\([^)]*\)|\S+", left)]
    taken = right.split()

    def axis(token: str) -> Axis:
        widths = [sizes[letter] for letter in token.split("+")]
        if token in taken:
            return Axis(sum(widths), 0, sum(widths))
        [(k, width)] = [
            (k, w) for k, (letter, w) in enumerate(zip(token.split("+"), widths, strict=True)) if letter in taken
        ]
        return Axis(sum(widths), sum(widths[:k]), sum(widths[:k]) + width)

    first = [token for token in dims[0] if token in taken or set(token.split("+")) & set(taken)]
    return Row(
        leaf=leaf,
        tensor=tensor,
        rows=tuple(axis(token) for token in dims[0]),
        cols=tuple(axis(token) for dim in dims[1:] for token in dim),
        swapped=len(dims) > 1 and taken[0] not in {part for token in first for part in (token, *token.split("+"))},
        layers=layers,
        experts=experts,
        fp8=fp8,
    )


def scale_name(tensor: str) -> str:
    """Name of the block scales of an FP8 tensor."""
    return f"{tensor}_scale_inv"


def scale_rows(rows: list[Row], block: tuple[int, int]) -> list[Row]:
    """Rows of the FP8 scales of these rows' tensors, one a tensor, for variables that keep FP8.

    Their leaves lie in the collection `scales`, by the tensors' names: `scales/moe_layers/self_attn.kv_b_proj`.
    """
    found: dict[tuple[str, tuple[int, ...] | None], Row] = {}
    for row in rows:
        if row.fp8 and (row.tensor, row.layers) not in found:
            group = row.leaf.split("/")[1]
            tail = row.tensor.removeprefix("model.layers.{layer}.").removesuffix(".weight").replace(".{expert}", "")
            axes = [Axis(-(-n // b), 0, -(-n // b)) for n, b in zip(row.tensor_shape, block, strict=True)]
            found[row.tensor, row.layers] = Row(
                leaf=f"scales/{group}/{tail}",
                tensor=scale_name(row.tensor),
                rows=(axes[0],),
                cols=(axes[1],),
                swapped=False,
                layers=row.layers,
                experts=row.experts,
            )
    return list(found.values())
