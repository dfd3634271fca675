"""The columns of the tables of a batch, which every backend reads: ``csrc/batch.h`` names the same in the same order.

Row indices are those of the batch; offsets and lengths count elements.
"""

from enum import IntEnum

MAX_STATES = 3
MAX_OPTIONS = 6


class Column(IntEnum):
    """Columns of the tensor table, int64. Pointers are addresses; 0 stands for "none"."""

    PARAM = 0
    GRAD = 1  # 0: no gradient this step, the tensor is left alone
    STATE = 2  # MAX_STATES columns, in the formula's order
    STEP = 5  # float32, the number of steps taken; 0 where the formula does not count them
    RADIUS = 6  # float64, one per layer; 0 where the tensor does not rotate
    NUMEL = 7
    LAYERS = 8  # equal slices of the tensor, one layer each
    FIRST_LAYER = 9  # row in dots, coefficients and counts
    HYPER = 10  # row in the hyperparameter table
    FLAGS = 11
    RULE = 12  # its number in formulas.py
    REMAINDER = 13  # of a 16-bit parameter, int16; 0 where it has none: see compensation.py
    WIDTH = 14


class Flag(IntEnum):
    """Bits of ``Column.FLAGS``."""

    ROTATES = 1
    CURRENT = 2  # radius="current"
    PART = 4  # a part of its layers: their dots are those of all parts, which cannot be measured again here
    WAITS = 8  # a radius below 0 is the norm from which on the layer turns: see coefficients of rotation.py


class Hyper(IntEnum):
    """Columns of the hyperparameter table, float64."""

    LR = 0
    WEIGHT_DECAY = 1
    GRAD_SCALE = 2  # multiplies the gradient: -1 under maximize
    NOISE = 3  # of the step, as a part of the norm of the weights: see formulas/rotation.py
    OPTION = 4  # MAX_OPTIONS columns, in the order of Base.scalars
    RADIUS_LR = 10  # of radius="learned", as a multiple of LR; 0 elsewhere
    WIDTH = 11


class Layer(IntEnum):
    """Columns of the layer table, int64."""

    TENSOR = 0
    FIRST_TILE = 1
    TILES = 2
    WIDTH = 3


class Tile(IntEnum):
    """Columns of the tile table, int64. A tile never crosses from one layer into the next."""

    TENSOR = 0
    LAYER = 1
    OFFSET = 2  # from the tensor's first element
    LENGTH = 3
    WIDTH = 4


class Count(IntEnum):
    """Columns of the counts, int64, summed over steps, per layer."""

    NON_FINITE = 0  # elements of gradient, state or step that counted as zero
    NO_DIRECTION = 1  # steps at lr > 0 in which a rotating layer had no direction to turn in
    BROKEN = 2  # steps in which a rotating layer's weights were not finite
    WIDTH = 3


class Coefficient(IntEnum):
    """Columns of the coefficient table, float64: see ``coefficients`` of ``rotation.py``."""

    A = 0
    B = 1
    C = 2
    MODE = 3
    WIDTH = 4
