"""Time to draw the noise of a batch on the CPU, relative to PyTorch's generator with one generator per image.

taskset -c 1 python -m benchmarks.noise [REPEATS]

The baseline also gives each image a stream of its own, as version 0.1 did.
"""

import sys

import torch

from benchmarks.timing import compare, show, timed
from diffaccel.noise import NoiseStreams

SHAPE, LIMIT, DRAWS = (3, 32, 32), 1.0, 20


def main(repeats: int = 25) -> None:
    """Measure both batch sizes."""
    torch.set_num_threads(1)
    rows = {}
    for batch in (64, 512):
        like = torch.empty(batch, *SHAPE)

        def ours() -> None:
            for _ in range(DRAWS):
                NoiseStreams(0, range(batch)).normal(like)  # noqa: B023 (called before the next batch)

        def generators() -> None:
            for _ in range(DRAWS):
                streams = [torch.Generator().manual_seed(index) for index in range(batch)]  # noqa: B023
                noise = torch.empty_like(like)  # noqa: B023
                for row, generator in zip(noise, streams, strict=True):
                    row.normal_(generator=generator)

        rows[f"{batch} images, first draw"] = (compare(timed(ours), timed(generators), repeats), LIMIT, None)
    show(f"{DRAWS} times the noise of a batch of 3 x 32 x 32", rows)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
