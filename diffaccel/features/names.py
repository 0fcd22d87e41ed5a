"""Names of distances in the features of extractors; importable without PyTorch."""


def distance_key(extractor: str) -> str:
    """Key of the Frechet distance in the features of an extractor of this name; ``fid`` is Inception's alone."""
    return "fid" if extractor == "inception" else f"fd_{extractor}"
