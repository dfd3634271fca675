"""Layer-wise conditioning: second moments of what goes into a layer and of the gradient that comes back to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import PassWatcher, first_of
from .rows import choose_layers, input_parts, output_parts
from .spectrum import SecondMoment, Spectrum


@dataclass(frozen=True)
class LayerCondition:
    """One layer's spectra in one pass: of Sigma_x, and of Sigma_g (None where no gradient came back).

    The layer's block of the Fisher matrix is about their Kronecker product, so its largest eigenvalue and its condition
    number are the products of theirs.
    """

    inputs: Spectrum
    gradients: Spectrum | None

    @property
    def largest(self) -> float | None:
        """lambda_max of the block; None where no gradient came back."""
        return None if self.gradients is None else self.inputs.largest * self.gradients.largest

    def condition(self, p: float = 1.0) -> float | None:
        """The product of the two kappa_p (:meth:`Spectrum.condition`); None where no gradient came back.

        At p = 1 it is the condition number of the block. Below it is not the block's own kappa_p, whose eigenvalues are
        the products of every two of theirs.
        """
        return None if self.gradients is None else self.inputs.condition(p) * self.gradients.condition(p)


@dataclass
class _Moments:
    inputs: SecondMoment
    gradients: SecondMoment


class LayerConditioning(PassWatcher[dict[str, _Moments], LayerCondition]):
    """Measures the conditioning of layers during a training (Huang et al., ECCV 2020), through hooks.

    Sigma_x = X^T X / m of the inputs X, (m, d), uncentred and without the bias; Sigma_g = m G^T G of the gradients G at
    the outputs. Linear: a sample is a vector along the last dimension. Convolutions: a sample is a position of the
    output with its unfolded patch. ``records[pass][name]`` is a :class:`LayerCondition`.

    Args:
        model: its forward passes with gradients enabled are counted, each with the backward pass before the next one.
        layers: names of Linear, Conv1d, Conv2d or Conv3d modules; None: all of them. Those that the forward pass does
            not call as modules (``out_proj`` of nn.MultiheadAttention) have no record.
        every: measure every k-th pass.
        patches: False: the input samples of convolutions are the channels at every pixel, so d is their number.
        mean_loss: whether the loss is a mean over the m samples, which the factor m undoes; False for a sum, where
            Sigma_g = G^T G / m. Only lambda_max depends on it. A loss scale s (GradScaler) enters it as s^2.

    Memory: 8 (d^2 + k^2) bytes for each layer of d inputs and k outputs, during a measured pass and until the next;
    32 MiB of scratch, or one sample's patches in float64; afterwards 8 (d + k) bytes a record. Time: m (d^2 + k^2)
    multiply-adds in float64, and the eigenvalues, O(d^3 + k^3), where the measurement ends: with the next pass, when
    ``records`` is read, or at :meth:`remove`, which leaving ``with LayerConditioning(...)`` calls, too.

    Raises TypeError or ValueError for arguments that it cannot take.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None = None,
        *,
        every: int = 1,
        patches: bool = True,
        mean_loss: bool = True,
    ) -> None:
        super().__init__(model, every)
        self._patches, self._mean_loss = patches, mean_loss
        try:
            chosen = choose_layers(
                model, layers, patches=patches, way_out="pass patches=False, or leave it out of layers"
            )
        except BaseException:
            self.remove()
            raise
        self._handles += [
            layer.register_forward_hook(partial(self._after, name), with_kwargs=True) for name, layer in chosen.items()
        ]

    def _new_notes(self) -> dict[str, _Moments]:
        return {}

    @torch.no_grad()
    def _after(self, name: str, layer: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Tensor) -> None:
        notes = self._notes
        if notes is None:
            return
        moments = notes.setdefault(name, _Moments(SecondMoment(), SecondMoment()))
        inputs = first_of(args, kwargs, f"the input of layer {name!r}")
        moments.inputs.add(input_parts(layer, inputs, patches=self._patches))
        if output.requires_grad:
            # A module's own backward hook would forbid in-place activations after it.
            output.register_hook(partial(self._on_gradient, moments.gradients, layer))

    @staticmethod
    @torch.no_grad()
    def _on_gradient(moment: SecondMoment, layer: nn.Module, grad: Tensor) -> None:
        moment.add(output_parts(layer, grad))

    def _results(self, notes: dict[str, _Moments]) -> dict[str, LayerCondition]:
        results = {}
        for name, moments in notes.items():
            inputs = moments.inputs.spectrum()
            if inputs is not None:
                results[name] = LayerCondition(inputs, moments.gradients.spectrum(undo_mean=self._mean_loss))
        return results
