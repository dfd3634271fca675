"""layer_groups and the head: logits over a vocabulary stay off the sphere, unless asked for."""

from collections.abc import Callable

import pytest
from torch import nn

from layca_fast import layer_groups

from ..support import resting, turning


class Says(nn.Module):
    """A model of language that knows its head, as those of transformers do."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(6, 11, bias=False)
        self.tokens = nn.Embedding(11, 6)
        self.hidden = nn.Sequential(nn.Linear(6, 11), nn.Linear(11, 6))
        if tied:
            self.head.weight = self.tokens.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def by_shape() -> nn.Module:
    """Of which another layer has the shape, too; the last one is the head."""
    return nn.ModuleDict({"tokens": nn.Embedding(11, 6), "hidden": nn.Linear(6, 11), "head": nn.Linear(6, 11)})


def factorised() -> nn.Module:
    """An embedding of another width than the head."""
    return nn.ModuleDict({"tokens": nn.Embedding(11, 3), "hidden": nn.Linear(3, 6), "head": nn.Linear(6, 11)})


def in_front() -> nn.Module:
    """Defined before all else, and the only one of its shape."""
    return nn.ModuleDict({"head": nn.Linear(6, 11), "tokens": nn.Embedding(11, 6), "hidden": nn.Linear(6, 6)})


def classifier() -> nn.Module:
    """No vocabulary: positions are as many as the outputs of its last layers."""
    return nn.ModuleDict({"positions": nn.Embedding(5, 6), "hidden": nn.Linear(6, 5), "head": nn.Linear(6, 5)})


def perceptron() -> nn.Module:
    """No embedding at all."""
    return nn.ModuleDict({"hidden": nn.Linear(6, 5), "head": nn.Linear(5, 3)})


def functional() -> nn.Module:
    """Of a head tied to the embedding by a product in forward, of whose shape two hidden layers happen to be."""
    return nn.Sequential(nn.Embedding(24, 6), *(nn.Linear(*each) for each in [(6, 24), (24, 6)] * 2))


VOCABULARIES = (Says, by_shape, factorised, in_front)


@pytest.mark.parametrize("head", [None, False, True])
@pytest.mark.parametrize("make", VOCABULARIES, ids=lambda make: make.__name__)
def test_logits_over_a_vocabulary_rotate_only_if_asked_for(
    make: Callable[[], nn.Module], head: bool | None, seed: int
) -> None:
    groups = layer_groups(make(), head=head)
    assert ("head.weight" in turning(groups)) == (head is True)
    assert head is True or resting(groups)["head.weight"] == "logits"
    assert any(name.startswith("hidden") for name in turning(groups))
    assert resting(groups)["tokens.weight"] == "embedding"


@pytest.mark.parametrize("head", [None, False, True])
@pytest.mark.parametrize("embeddings", [False, True])
def test_a_tied_head_goes_with_its_embedding(embeddings: bool, head: bool | None, seed: int) -> None:
    groups = layer_groups(Says(tied=True), head=head, embeddings=embeddings)
    rotates = embeddings or head is True
    assert ("head.weight" in turning(groups)) == rotates
    assert rotates or resting(groups)["head.weight"] == "embedding and logits"


@pytest.mark.parametrize(("head", "rotates"), [(None, True), (False, False), (True, True)])
@pytest.mark.parametrize("make", [classifier, perceptron])
def test_the_last_linear_of_a_classifier_is_a_layer_unless_said_otherwise(
    make: Callable[[], nn.Module], head: bool | None, rotates: bool, seed: int
) -> None:
    groups = layer_groups(make(), head=head)
    assert ("head.weight" in turning(groups)) == rotates
    assert "hidden.weight" in turning(groups)
    others = layer_groups(make(), head=head, base="muon", others_base="adam")
    assert ("head.weight" in turning(others)) == (head is True)


def test_hidden_layers_that_happen_to_have_the_shape_of_the_table_rotate(seed: int) -> None:
    groups = layer_groups(functional())
    assert set(resting(groups).values()) == {"embedding", "bias"}


@pytest.mark.parametrize("asked", [{}, {"rotate": 1}, {"rotate": False}], ids=str)
@pytest.mark.parametrize("head", [None, False, True])
def test_rotate_has_the_last_word_on_the_head(asked: dict[str, int], head: bool | None, seed: int) -> None:
    model = Says()
    groups = layer_groups(model, head=head, rotate={model.head: asked["rotate"]} if asked else {})
    assert ("head.weight" in turning(groups)) == bool(asked.get("rotate", head is True))


def test_a_frozen_head_is_left_out(seed: int) -> None:
    model = Says()
    model.head.requires_grad_(False)
    groups = layer_groups(model, head=True)
    assert "head.weight" not in turning(groups)
    assert groups.left_out == 1


def test_what_head_cannot_be_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=r"head='on' is unknown: choose one of \[None, False, True\]"):
        layer_groups(Says(), head="on")
