"""For tests with the packages of requirements/trainers.txt, which ``make test-trainers`` runs."""

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


def pytest_configure(config: pytest.Config) -> None:
    for each in ALLOWED:
        config.addinivalue_line("filterwarnings", each)


@pytest.fixture(autouse=True)
def threads(one_thread: None) -> None:
    """One for each worker: the models are tiny, and more of them only wait for each other."""
