"""Parameter shapes of the models that the benchmarks step, in the order of the model's parameters."""

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """ResNet-50 (arXiv 1512.03385) with batch norm: 161 tensors, 25.6 million weights."""

    def conv(out: int, into: int, kernel: int) -> list[Shape]:
        return [(out, into, kernel, kernel), (out,), (out,)]

    shapes = conv(64, 3, 7)
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(width, into, 1) + conv(width, width, 3) + conv(4 * width, width, 1)
            if block == 0:
                shapes += conv(4 * width, into, 1)
            into = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2_small() -> list[Shape]:
    """GPT-2 small with tied embeddings: 148 tensors, 124 million weights."""
    d = 768
    norm: list[Shape] = [(d,), (d,)]
    block = [*norm, (d, 3 * d), (3 * d,), (d, d), (d,), *norm, (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *block * 12, *norm]


def vit_b16() -> list[Shape]:
    """ViT-B/16 (arXiv 2010.11929) at 224 x 224, 1,000 classes: 152 tensors, 86.6 million weights."""
    d = 768
    norm: list[Shape] = [(d,), (d,)]
    block = [*norm, (3 * d, d), (3 * d,), (d, d), (d,), *norm, (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [(1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,), *block * 12, *norm, (1000, d), (1000,)]


def _llama(d: int, key_value: int, hidden: int, blocks: int) -> list[Shape]:
    """The blocks of a Llama and its last norm."""
    attention: list[Shape] = [(d,), (d, d), (key_value, d), (key_value, d), (d, d)]
    mlp: list[Shape] = [(d,), (hidden, d), (hidden, d), (d, hidden)]
    return [*(attention + mlp) * blocks, (d,)]


def llama_1b() -> list[Shape]:
    """A Llama of the size of Llama 3.2 1B, tied embeddings, grouped queries: 146 tensors, 1.24 billion weights."""
    return [(128256, 2048), *_llama(2048, 512, 8192, 16)]


def llama_7b() -> list[Shape]:
    """A Llama of the size of Llama 2 7B: 291 tensors, 6.74 billion weights. Too large to be stepped here."""
    return [(32000, 4096), *_llama(4096, 4096, 11008, 32), (32000, 4096)]


def llama_70b() -> list[Shape]:
    """A Llama of the size of Llama 2 70B, grouped queries: 723 tensors, 69 billion weights."""
    return [(32000, 8192), *_llama(8192, 1024, 28672, 80), (32000, 8192)]


def square_1b() -> list[Shape]:
    """60 square matrices of 4096 x 4096: 1.007 billion weights, and nothing that is not memory."""
    return [(4096, 4096)] * 60


def four_large() -> list[Shape]:
    """4 square matrices of 31 million weights: nothing of a layer is left in a cache for its second pass."""
    return [(5568, 5568)] * 4


def many_small() -> list[Shape]:
    """2,000 square matrices of 10,000 weights."""
    return [(100, 100)] * 2000


def many_tiny() -> list[Shape]:
    """10,000 square matrices of 100 weights: the overhead per tensor, and little else."""
    return [(10, 10)] * 10_000


MODELS = {
    "ResNet-50": resnet50,
    "ViT-B/16": vit_b16,
    "GPT-2 small": gpt2_small,
    "Llama 1B": llama_1b,
    "1B in 4096 x 4096": square_1b,
    "4 x 31M": four_large,
    "2000 x 10k": many_small,
    "10000 x 100": many_tiny,
}

#: Those of the table and the figure in docs/speed.md.
HEADLINE = ("ResNet-50", "GPT-2 small", "2000 x 10k")

#: Those that two cores step with every provider in minutes.
QUICK = ("ResNet-50", "2000 x 10k", "10000 x 100")
