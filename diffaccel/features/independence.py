"""Independence of judges: an extractor whose weights have trained a model does not score that model.

A generator can lower the distance in the features that its loss saw without better images. The hashes of the frozen
feature networks in losses and critics are therefore recorded with the trained weights, as ``feature_networks``.
"""

from collections.abc import Collection, Iterable

from torch import nn

from diffaccel.errors import UsageError
from diffaccel.features.extractors import Extractor


def feature_networks(modules: Iterable[nn.Module]) -> list[str]:
    """Return the hashes of the feature networks among modules, sorted: those with an attribute ``weights_sha256``."""
    found = (getattr(module, "weights_sha256", None) for module in modules)
    return sorted({str(sha256) for sha256 in found if sha256 is not None})


def check_independent(judges: Iterable[Extractor], used: Collection[str], origin: str) -> None:
    """Check that no judge has weights that trained the model it scores.

    Args:
        judges: Extractors that score the model's images.
        used: Hashes of the feature networks that losses and critics used.
        origin: Weights or run that was trained with them, for the message.

    Raises:
        UsageError: A judge has.
    """
    for judge in judges:
        if judge.weights_sha256 in used:
            raise UsageError(
                f"extractor {judge.name!r} can't score {origin}, which was trained with its weights "
                f"({judge.weights_sha256[:12]}): score with another extractor"
            )
