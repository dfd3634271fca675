"""For tests with the packages of requirements/trainers.txt, which ``make test-trainers`` runs."""

import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest

#: Warnings about what these packages do, or advise, that pass in spite of ``filterwarnings = error``.
ALLOWED = (
    # Lightning walks nested batches with a class of torch that has been renamed since.
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
    # Lightning advises processes for data that is a list in memory.
    r"ignore:The 'train_dataloader' does not have many workers:UserWarning",
    # Lightning's table of the model's size counts no 16-bit numbers.
    r"ignore:Precision bf16-mixed is not supported by the model summary:UserWarning",
    # A run resumed with its checkpoints in another folder, so that it cannot touch those of the first.
    r"ignore:The dirpath has changed from:UserWarning",
)


class _Named(type):
    """A class whose attributes are their own names, as members of an enumeration are asked for."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Empty(ModuleType):
    """A module of torchvision in name only: there is none for CPU torch, and timm imports it for its data sets."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Named(name, (), {})


class _EmptyTorchvision(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torchvision, or an empty one for the imports of this test: others look for it, and would take it for the real."""
    if find_spec("torchvision") is not None:
        yield
        return
    monkeypatch.setattr(sys, "meta_path", [_EmptyTorchvision(), *sys.meta_path])
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def pytest_configure(config: pytest.Config) -> None:
    for each in ALLOWED:
        config.addinivalue_line("filterwarnings", each)


@pytest.fixture(autouse=True)
def threads(one_thread: None) -> None:
    """One for each worker: the models are tiny, and more of them only wait for each other."""
