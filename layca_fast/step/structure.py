"""The tables that follow from the structure of a batch alone: layers, tiles, and scratch for their sums."""

from functools import cached_property

import torch
from torch import Tensor

from ..formulas.tables import MAX_OPTIONS, Layer, Tile
from ..state.slot import Slot


class Structure:
    """Tables of ``slots``, cut into tiles of ``tile`` elements, made when they are first asked for, on ``_home``."""

    slots: list[Slot]
    tile: int
    n_layers: int
    _home: torch.device

    @cached_property
    def layer_tensors(self) -> Tensor:
        """The tensor row of each layer, (layers,) int64."""
        return self.layers[:, Layer.TENSOR]

    @cached_property
    def layers(self) -> Tensor:
        """The layer table, (layers, Layer.WIDTH) int64."""
        rows, first_tile = [], 0
        for tensor, slot in enumerate(self.slots):
            length = slot.param.numel() // slot.layers
            tiles = -(-length // self.tile)
            for _ in range(slot.layers):
                rows.append((tensor, first_tile, tiles))
                first_tile += tiles
        return torch.tensor(rows, dtype=torch.int64, device=self._home)

    @cached_property
    def tiles(self) -> Tensor:
        """The tile table, (tiles, Tile.WIDTH) int64."""
        rows, layer = [], 0
        for tensor, slot in enumerate(self.slots):
            length = slot.param.numel() // slot.layers
            for i in range(slot.layers):
                rows += [
                    (tensor, layer + i, i * length + start, min(self.tile, length - start))
                    for start in range(0, length, self.tile)
                ]
            layer += slot.layers
        return torch.tensor(rows, dtype=torch.int64, device=self._home).reshape(-1, Tile.WIDTH)

    @cached_property
    def n_tiles(self) -> int:
        return sum(slot.layers * -(-(slot.param.numel() // slot.layers) // self.tile) for slot in self.slots)

    @cached_property
    def partials(self) -> Tensor:
        """Scratch for the dots of each tile, (tiles, 3) float64."""
        return torch.zeros(self.n_tiles, 3, dtype=torch.float64, device=self._home)

    @cached_property
    def step_options(self) -> Tensor:
        """This step's options of every tensor, (tensors, MAX_OPTIONS) float64, where the formula counts its steps."""
        return torch.zeros(len(self.slots), MAX_OPTIONS, dtype=torch.float64, device=self._home)

    @cached_property
    def partial_counts(self) -> Tensor:
        """Scratch for the non-finite elements of each tile, (tiles,) int64."""
        return torch.zeros(self.n_tiles, dtype=torch.int64, device=self._home)
