"""Checkpoints of score_sde_pytorch: {optimizer, model, ema, step}.

``model`` contains modules by number in the order of construction; ``ema`` lists the trained tensors in the same order,
without names. Data are in [0, 1] for networks of the VE SDE, and in [-1, 1] for those of the VP SDE.

References:
    Score-Based Generative Modeling through SDEs (Song et al., 2021), https://arxiv.org/abs/2011.13456, PyTorch code
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from diffaccel.nn.ncsnpp import Block, BlurredConv, Fourier, NCSNpp
from diffaccel.pretrained.checkpoint import (
    Entry,
    assemble,
    attention_size,
    build_on_meta,
    check_names,
    foreign,
    refuse_unused,
    replaced,
    unwrap,
)
from diffaccel.weights import FORMATS, File, Format, Weights
from diffaccel.weights.pickles import refuse
from diffaccel.weights.torchfile import Stored

Options = Mapping[str, Any]


def listing(network: NCSNpp) -> list[Entry]:
    """Return the entries of a network's tensors in score_sde_pytorch's order, except for ``sigmas``."""
    entries = []
    for index, (kind, prefix, module) in enumerate(_modules(network)):
        entries += [entry._replace(name=f"all_modules.{index}.{entry.name}") for entry in _KINDS[kind](prefix, module)]
    return entries


def _modules(network: NCSNpp) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield kind, prefix and module in the order of score_sde_pytorch, where attention is a separate module."""
    if isinstance(network.map_noise, Fourier):
        yield "fourier", "map_noise", network.map_noise
    for name in ("map_layer0", "map_layer1"):
        yield "plain", name, getattr(network, name)
    for half in ("enc", "dec"):
        for name, module in getattr(network, half).items():
            prefix = f"{half}.{name}"
            if isinstance(module, Block):
                yield "block", prefix, module
                if module.attends:
                    yield "attention", prefix, module
            else:
                kind = "pyramid" if isinstance(module, BlurredConv) else "combine" if "aux_skip" in name else "plain"
                yield kind, prefix, module


def _pairs(name: str, own: str, module: Any) -> list[Entry]:
    """Entries of weight and bias."""
    return [Entry(f"{name}{end}", tuple(getattr(module, end).shape), f"{own}.{end}") for end in ("weight", "bias")]


def _block(prefix: str, block: Any) -> list[Entry]:
    named = [("GroupNorm_0", "norm0"), ("Conv_0", "conv0"), ("Dense_0", "affine"), ("GroupNorm_1", "norm1")]
    named += [("Conv_1", "conv1")] + ([("Conv_2", "skip")] if isinstance(block.skip, nn.Conv2d) else [])
    return [entry for name, own in named for entry in _pairs(f"{name}.", f"{prefix}.{own}", getattr(block, own))]


def _attention(prefix: str, block: Any) -> list[Entry]:
    width = block.proj.weight.shape[0]
    entries = _pairs("GroupNorm_0.", f"{prefix}.norm2", block.norm2)
    for j in range(4):
        # In diffaccel's network, q, k and v are interleaved by channel.
        own, rows = (f"{prefix}.qkv", slice(j, None, 3)) if j < 3 else (f"{prefix}.proj", None)
        entries.append(Entry(f"NIN_{j}.W", (width, width), f"{own}.weight", rows, transposed=True))
        entries.append(Entry(f"NIN_{j}.b", (width,), f"{own}.bias", rows))
    return entries


_KINDS: dict[str, Any] = {
    "fourier": lambda prefix, module: [Entry("W", tuple(module.freqs.shape), f"{prefix}.freqs")],
    "plain": lambda prefix, module: _pairs("", prefix, module),
    "pyramid": lambda prefix, module: _pairs("Conv2d_0.", prefix, module),
    "combine": lambda prefix, module: _pairs("Conv_0.", prefix, module),
    "block": _block,
    "attention": _attention,
}


@FORMATS.register("score_sde_pytorch")
class ScoreSDE(Format):
    """Checkpoints of score_sde_pytorch, with any file name."""

    def recognises(self, file: File) -> bool:
        """See :class:`Format`; recognises mappings with ``model`` or ``ema``."""
        content = file.archive
        return isinstance(content, dict) and "diffaccel" not in content and not content.keys().isdisjoint(_KEYS)

    def open(self, file: File, options: Options) -> Weights:
        """Infer network and preconditioning from names and shapes.

        Args:
            file: File.
            options: ``weights`` (``ema`` or ``raw``), ``size`` of the images in pixels, ``sigma_max`` of a VE network
                in units of its data; each is optional.

        Raises:
            UsageError: The file is damaged or contains code, is not a continuous NCSN++ or DDPM++, or is of the VP SDE
                and ``sigma_max`` is given.
        """
        origin = str(file.path)
        model, shadow = _parts(file.archive, origin)
        sigmas = model.pop("sigmas", None)
        network, shape = infer_layout(model, origin, options.get("size"))
        on_meta = build_on_meta(origin, network, shape, len(model))
        assert isinstance(on_meta, NCSNpp)
        entries = listing(on_meta)
        check_names(origin, {entry.name: entry.shape for entry in entries}, model)
        weights = options.get("weights", "ema")
        chosen = model if weights == "raw" else {**model, **_averaged(model, shadow, origin)}
        positional = network["embedding"] == "positional"
        refuse_unused(origin, options, "weights", "size", *([] if positional else ["sigma_max"]))
        process, denoiser, units = _vp() if positional else _ve(sigmas, options.get("sigma_max"), origin)
        attention = network["attention"]
        stated = {
            "size": 16 * shape[1] // attention[0] if len(attention) == 1 else None,
            "sigma_max": None if sigmas is None else float(f"{sigmas.load()[0].item():.6g}"),
        }
        source = {"format": "score_sde_pytorch", "weights": weights, "units": units, **replaced(stated, options)}
        parts = {"network": network, "denoiser": denoiser, "process": process}
        return foreign(file.path, shape, parts, source, lambda: assemble(origin, entries, chosen, on_meta))


_KEYS = ("model", "ema")


def _parts(content: Any, origin: str) -> tuple[dict[str, Stored], list[Any]]:
    """Tensors of ``model``, and the list of ``ema``."""
    model = content.get("model") if isinstance(content, dict) else None
    ema = content.get("ema") if isinstance(content, dict) else None
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(model, dict) or not isinstance(shadow, list):
        raise refuse(origin, "it holds no 'model' with an 'ema' that lists 'shadow_params', as score_sde_pytorch's do")
    named = unwrap(origin, {str(name): value for name, value in model.items()})
    if not all(isinstance(value, Stored) for value in (*named.values(), *shadow)):
        raise refuse(origin, "its 'model' or 'ema' holds something that is no tensor")
    return named, shadow


def _averaged(model: Mapping[str, Stored], shadow: list[Any], origin: str) -> dict[str, Stored]:
    """Add names to the averages, which are all tensors in order except for the frequencies, which are not trained."""
    names = [name for name in model if name != "all_modules.0.W"]
    shapes = [model[name].shape for name in names], [value.shape for value in shadow]
    if shapes[0] != shapes[1]:
        raise refuse(
            origin,
            f"its 'ema' lists {len(shadow)} tensors, its 'model' has {len(names)} trained ones, or their shapes differ",
        )
    return dict(zip(names, shadow, strict=True))


def _vp() -> tuple[dict[str, Any], dict[str, Any], str]:
    return {"name": "vp"}, {"name": "vp"}, "[-1, 1], as in the file"


def _ve(sigmas: Stored | None, sigma_max: Any, origin: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Process, denoiser and units of the VE SDE, with levels doubled like the range of the data."""
    if sigmas is None and sigma_max is None:
        raise refuse(origin, "it does not contain the highest noise level: give sigma_max=, in units of [0, 1]")
    ends = [float(sigma_max), 0.01] if sigmas is None else sigmas.load().double()[[0, -1]].tolist()
    high, low = 2 * float(f"{sigma_max or ends[0]:.6g}"), 2 * float(f"{ends[1]:.6g}")
    if not 0 < low < high < 1e5:
        raise refuse(origin, f"its noise levels run from {low / 2} to {high / 2}")
    levels = {"sigma_min": low, "sigma_max": high}
    denoiser = {"name": "ve", "unit": 2.0, "ratio_min": low, "ratio_max": high}
    return {"name": "ve", **levels}, denoiser, "[0, 1] in the file: noise levels doubled, once"


# Layout from names and shapes


class Module(NamedTuple):
    """Numbered module: kind, input and output channels, and whether it has a 1x1 skip convolution."""

    kind: str
    width_in: int
    width: int
    skip: bool = False


def infer_layout(
    model: Mapping[str, Stored], origin: str, size: int | None
) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """Infer the arguments of :class:`~diffaccel.nn.ncsnpp.NCSNpp` and the image shape.

    Raises:
        UsageError: The layout is not supported.
    """
    modules = [_module(index, group, origin) for index, group in enumerate(_groups(model, origin))]
    kinds = "".join(module.kind for module in modules)
    start = re.match("F?LLC", kinds)
    if start is None:
        raise refuse(origin, f"its modules begin with {kinds[:6]!r} and not as NCSN++ or DDPM++ do")
    stem = modules[start.end() - 1]
    levels = _levels(modules[start.end() :], origin)
    encoder = {"P": "residual", "K": "skip"}.get(levels[0][3], "standard")
    embedding = "fourier" if kinds[0] == "F" else "positional"
    if embedding == "positional" and encoder != "standard":
        raise refuse(
            origin,
            "it joins an NCSN++ with an embedding of indices: a discrete-time VE file, or VP's of the same layout, "
            "which nothing in it tells apart",
        )
    attends = [level for level, (_, _, attended, _) in enumerate(levels) if attended]
    pixels = attention_size(origin, attends, size)
    network = {
        "name": "ncsnpp",
        "width": stem.width,
        "multipliers": [width // stem.width for width, _, _, _ in levels],
        "blocks": levels[0][1],
        "attention": [pixels // 2**level for level in attends],
        "embedding": embedding,
        "resample": "box" if encoder == "standard" else "fir",
        "encoder": encoder,
        "decoder": "skip" if kinds.count("N") > 1 else "standard",
        "dropout": 0.0 if encoder == "skip" else 0.1,
    }
    return network, (stem.width_in, pixels, pixels)


def _groups(model: Mapping[str, Stored], origin: str) -> list[dict[str, Stored]]:
    """Tensors of each numbered module, by the remaining parts of their names."""
    groups: dict[int, dict[str, Stored]] = {}
    for name, value in model.items():
        match = re.fullmatch(r"all_modules\.(\d{1,4})\.(\w+(?:\.\w+)?)", name)
        if match is None:
            raise refuse(origin, f"its tensor {name[:60]!r} is none of score_sde_pytorch's NCSN++ or DDPM++")
        groups.setdefault(int(match[1]), {})[match[2]] = value
    if sorted(groups) != list(range(len(groups))):
        raise refuse(origin, "its modules' numbers have gaps")
    return [groups[index] for index in range(len(groups))]


def _module(index: int, group: Mapping[str, Stored], origin: str) -> Module:
    """Infer the kind of a module."""

    def ends(name: str) -> tuple[int, int]:
        return group[name].shape[1], group[name].shape[0]

    if "W" in group:
        return Module("F", 0, 0)
    if "NIN_0.W" in group:
        return Module("A", 0, 0)
    for name, kind in (("Dense_0.weight", "R"), ("Conv2d_0.weight", "P"), ("Conv_0.weight", "K")):
        if name in group:
            weight = "Conv_0.weight" if kind == "R" else name
            if weight in group and len(group[weight].shape) == 4:
                return Module(kind, *ends(weight), "Conv_2.weight" in group)
    rank = len(group["weight"].shape) if "weight" in group else 0
    if rank not in (1, 2, 4):
        raise refuse(origin, f"its module {index} holds {sorted(group)[:3]}, which no such network has")
    return Module({1: "N", 2: "L", 4: "C"}[rank], *(ends("weight") if rank > 1 else (0, 0)))


def _levels(modules: list[Module], origin: str) -> list[tuple[int, int, bool, str]]:
    """Width, number of blocks, attention, and kind of the module after downsampling, for each encoder resolution."""
    kinds = "".join(module.kind for module in modules)
    levels: list[tuple[int, int, bool, str]] = []
    at = 0
    while True:
        blocks, attended, width = 0, False, 0
        most = levels[0][1] if levels else len(modules)
        while blocks < most and at < len(modules) and modules[at].kind == "R" and not _halves(modules[at]):
            width = modules[at].width
            attends = kinds[at + 1 : at + 2] == "A"
            blocks, attended, at = blocks + 1, attended or attends, at + 1 + attends
        if blocks == 0 or (levels and blocks != most):
            raise refuse(origin, f"its resolution {len(levels)} has {blocks} residual blocks")
        if at == len(modules) or not _halves(modules[at]):
            levels.append((width, blocks, attended, ""))
            break
        joins = kinds[at + 1 : at + 2] if kinds[at + 1 : at + 2] in ("P", "K") else ""
        levels.append((width, blocks, attended, joins))
        at += 1 + len(joins)
    if len(levels) < 2:
        raise refuse(origin, "no resolution of it is halved as those of NCSN++ and DDPM++ are")
    return levels


def _halves(module: Module) -> bool:
    """Whether a block resamples, which requires a skip convolution even for equal widths."""
    return module.kind == "R" and module.skip and module.width_in == module.width
