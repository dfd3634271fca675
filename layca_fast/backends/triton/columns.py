"""Columns and flags of a batch's tables as compiled kernels may read them: see ``formulas/tables.py``."""

from enum import IntEnum
from typing import Any

from ...formulas import rotation
from ...formulas.tables import MAX_OPTIONS, Coefficient, Column, Count, Flag, Hyper, Layer, Tile
from .formulas import constant


def _constants(*members: IntEnum) -> tuple[Any, ...]:
    return tuple(constant(int(member)) for member in members)


_TENSOR_WIDTH, _PARAM, _GRAD, _STATE = _constants(Column.WIDTH, Column.PARAM, Column.GRAD, Column.STATE)
_RADIUS, _FIRST_LAYER, _HYPER, _FLAGS = _constants(Column.RADIUS, Column.FIRST_LAYER, Column.HYPER, Column.FLAGS)
_NUMEL, _LAYERS, _STEP, _RULE = _constants(Column.NUMEL, Column.LAYERS, Column.STEP, Column.RULE)
(_REMAINDER,) = _constants(Column.REMAINDER)
_ROTATES, _CURRENT, _PART, _WAITS = _constants(Flag.ROTATES, Flag.CURRENT, Flag.PART, Flag.WAITS)
_HYPER_WIDTH, _LR, _WEIGHT_DECAY = _constants(Hyper.WIDTH, Hyper.LR, Hyper.WEIGHT_DECAY)
_GRAD_SCALE, _NOISE, _OPTION = _constants(Hyper.GRAD_SCALE, Hyper.NOISE, Hyper.OPTION)
_LAYER_WIDTH, _LAYER_TENSOR, _FIRST_TILE, _TILES = _constants(Layer.WIDTH, Layer.TENSOR, Layer.FIRST_TILE, Layer.TILES)
_TILE_WIDTH, _TILE_TENSOR, _TILE_LAYER = _constants(Tile.WIDTH, Tile.TENSOR, Tile.LAYER)
_OFFSET, _LENGTH = _constants(Tile.OFFSET, Tile.LENGTH)
_COUNT_WIDTH, _NON_FINITE, _NO_DIRECTION, _BROKEN = _constants(
    Count.WIDTH, Count.NON_FINITE, Count.NO_DIRECTION, Count.BROKEN
)
_COEFFICIENT_WIDTH, _A, _B, _C, _MODE = _constants(
    Coefficient.WIDTH, Coefficient.A, Coefficient.B, Coefficient.C, Coefficient.MODE
)
_KEEP, _PRECISE = constant(rotation.KEEP), constant(rotation.PRECISE)
_MAX_OPTIONS = constant(MAX_OPTIONS)
