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


def many_small() -> list[Shape]:
    """2,000 square matrices of 10,000 weights."""
    return [(100, 100)] * 2000


MODELS = {"ResNet-50": resnet50, "GPT-2 small": gpt2_small, "2000 x 10k": many_small}
