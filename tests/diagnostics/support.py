"""A network of residual blocks that the tests of hooks share."""

from torch import Tensor, nn


class Block(nn.Module):
    """h + F(h), added in place to h or to F(h)."""

    def __init__(self, width: int, *, in_place: bool = False) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Tanh(), nn.Linear(width, width))
        self.in_place = in_place

    def forward(self, h: Tensor) -> Tensor:
        if self.in_place:
            h += self.branch(h)
            return h
        change = self.branch(h)
        change += h
        return change


class Residual(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.plain, self.in_place = Block(width), Block(width, in_place=True)
        self.norm, self.dropout, self.head = nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.in_place(h=self.plain(self.stem(x)))
        return self.head(self.dropout(self.norm(h)))
