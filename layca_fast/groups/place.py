"""Where a module stands in its model: what is around it tells what it is for."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, eq=False)
class Place:
    """A module, the name that it has in the one above it, and the place of that one; None at the top."""

    module: nn.Module
    name: str = ""
    above: "Place | None" = None

    def upwards(self) -> Iterator["Place"]:
        """This place and all above it."""
        place: Place | None = self
        while place is not None:
            yield place
            place = place.above

    def beside(self) -> dict[str, nn.Module]:
        """The other modules of the one above, by name."""
        if self.above is None:
            return {}
        return {name: each for name, each in self.above.module.named_children() if each is not self.module}


def places_of(model: nn.Module) -> dict[nn.Module, Place]:
    """The first place of every module of a model."""
    found = {model: Place(model)}
    waiting = [found[model]]
    while waiting:
        place = waiting.pop()
        for name, child in place.module.named_children():
            if child not in found:
                found[child] = Place(child, name, place)
                waiting.append(found[child])
    return found
