"""Captions: where they come from, encoders, cached embeddings, and which of several captions an image has."""

import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffaccel.captions.conditioner import Captions
from diffaccel.captions.embeddings import default_folder, embed, key_of
from diffaccel.captions.encoders import TextEncoder, Words
from diffaccel.captions.layouts import _pairs, generated, read_captions
from diffaccel.data import build_source
from diffaccel.data.conditions import CONDITIONERS, HeldOut
from diffaccel.data.source import ArrayImages
from diffaccel.errors import UsageError
from diffaccel.noise import NoiseStreams

SHAPE = (1, 4, 4)


class Letters(TextEncoder):
    """One token a letter, its code; counts what it encodes."""

    dim, length, cached = 2, 8, True

    def __init__(self) -> None:
        self.encoded: list[str] = []

    @property
    def sha256(self) -> str:
        return "letters"

    def encode(self, captions: Sequence[str]) -> Iterator[Tensor]:
        for caption in captions:
            self.encoded.append(caption)
            yield torch.tensor([[float(ord(letter)), 1.0] for letter in caption[: self.length]]).half()


def text_of(tokens: Tensor, valid: Tensor) -> list[str]:
    """What :class:`Letters` encoded."""
    return ["".join(chr(int(code)) for code in row[own, 0]) for row, own in zip(tokens, valid, strict=True)]


# --- Encoders


def test_words_are_fixed_vectors():
    """By the noise of their hash: the same in every run and on every machine, in lower case, without punctuation."""
    encoder = Words(dim=4, length=3)
    one, other = encoder.encode(["A seven, and", "don't 7 seven! cut off"])
    assert one.shape == (3, 4) and other.shape == (3, 4) and one.dtype == torch.float16
    assert torch.equal(one[1], other[2]) and not torch.equal(other[0], other[1])
    torch.testing.assert_close(one[1].float(), torch.tensor(SEVEN), atol=1e-3, rtol=0)
    assert torch.equal(next(Words(dim=4).encode(["SEVEN"]))[0], one[1])
    many = torch.stack([next(Words(dim=64).encode([f"w{i}"]))[0].float() for i in range(200)])
    assert many.mean().item() == pytest.approx(0, abs=0.03) and many.std().item() == pytest.approx(1, abs=0.03)
    assert (torch.corrcoef(many) - torch.eye(200)).abs().max() < 0.6, "words have nothing in common"
    assert next(encoder.encode([" ... "])).shape == (1, 4), "no word is a word of its own"
    assert Words(4).sha256 != Words(5).sha256


SEVEN = [-1.1884765625, -2.330078125, 0.149658203125, 0.03387451171875]


def tiny_clip(folder: Path, hidden: int = 16) -> Path:
    """A CLIP text model with random weights, and a tokenizer of letters and a few words."""
    transformers = pytest.importorskip("transformers", reason="the extra text is not installed")
    torch.manual_seed(0)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{one}</w>" for one in letters), "se", "seven</w>", "<|startoftext|>", "<|endoftext|>"]
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=hidden, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1,
        pad_token_id=len(tokens) - 1,
    )  # fmt: skip
    transformers.CLIPTextModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\ns e\n")
    said = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 12, "pad_token": "<|endoftext|>",
            "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def test_clip_is_that_of_transformers(tmp_path: Path):
    """The last hidden state of the tokens that are not padding, in half precision, in any batch."""
    folder = tiny_clip(tmp_path)
    import transformers

    from diffaccel.captions.pretrained import CLIPText

    encoder = CLIPText(folder, dim=16, length=10)
    captions = ["a seven", "z", "a very long caption that is cut"]
    found = list(encoder.encode(captions))
    model = transformers.CLIPTextModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for caption, own in zip(captions, found, strict=True):
        read = tokenizer([caption], truncation=True, max_length=10, return_tensors="pt")
        with torch.no_grad():
            expected = model(**read).last_hidden_state[0]
        assert own.shape == expected.shape and own.dtype == torch.float16
        torch.testing.assert_close(own.float(), expected, atol=2e-3, rtol=2e-3)
    assert len({len(own) for own in found}) == 3 and len(found[2]) == 10
    before = encoder.sha256
    assert CLIPText(folder, dim=16, length=10).sha256 == before != CLIPText(folder, dim=16, length=9).sha256
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert encoder.sha256 != before, "another tokenizer"


def tiny_t5(folder: Path) -> Path:
    """An encoder of T5 with random weights, and a tokenizer of whole words."""
    transformers = pytest.importorskip("transformers", reason="the extra text is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    torch.manual_seed(0)
    words = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", "a", "seven", "long", "one"])}
    config = transformers.T5Config(vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>",
            "unk_token": "<unk>", "model_max_length": 512}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def test_t5_is_that_of_transformers(tmp_path: Path):
    """The encoder's last hidden state, also of a batch with padding; captions of another length are cut off."""
    folder = tiny_t5(tmp_path)
    import transformers

    from diffaccel.captions.pretrained import T5Text

    captions = ["a seven", "one", "a long long long long seven"]
    found = list(T5Text(folder, dim=16, length=5).encode(captions))
    model = transformers.T5EncoderModel.from_pretrained(folder).eval()
    for ids, own in zip([[3, 4, 1], [6, 1], [3, 5, 5, 5, 1]], found, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert own.shape == expected.shape and own.dtype == torch.float16
        torch.testing.assert_close(own.float(), expected, atol=2e-3, rtol=2e-3)


def test_a_clip_that_is_not_there(tmp_path: Path):
    """One error before any caption is encoded, with the remedy."""
    pytest.importorskip("transformers", reason="the extra text is not installed")
    from diffaccel.captions.pretrained import CLIPText

    with pytest.raises(UsageError, match="encoder 'clip': there is no folder .*: set condition.encoder.path= to"):
        _ = CLIPText(tmp_path / "none").sha256
    with pytest.raises(UsageError, match="has no safetensors weights: convert them"):
        _ = CLIPText(tmp_path).sha256
    folder = tiny_clip(tmp_path / "tiny")
    with pytest.raises(UsageError, match="hidden states have the width 16, not 768: set condition.encoder.dim=16 and"):
        list(CLIPText(folder).encode(["a"]))
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UsageError, match="holds no such network and tokenizer"):
        list(CLIPText(folder, dim=16).encode(["a"]))


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from diffaccel.captions.pretrained import CLIPText

    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(UsageError, match=r"encoder 'clip' requires transformers.*pip install 'diffaccel\[text\]'"):
        _ = CLIPText(tmp_path).sha256


# --- Layouts


def labelled(labels: list[int]) -> ArrayImages:
    return ArrayImages(torch.zeros(len(labels), *SHAPE, dtype=torch.uint8), torch.tensor(labels), classes=3)


def test_sentences_are_generated_from_labels():
    found = generated(labelled([2, 0]), ["a {label}", "{label}!"], ["zero", "one", "two"], "x")
    assert found == [("a two", "two!"), ("a zero", "zero!")]
    assert generated(labelled([1]), ["{label}"], [], "x") == [("1",)]
    with pytest.raises(UsageError, match="x has 3 classes, but there are 2 names: name every class"):
        generated(labelled([0]), ["{label}"], ["a", "b"], "x")
    with pytest.raises(UsageError, match="the images of x have no labels: set condition.path="):
        generated(ArrayImages(torch.zeros(1, *SHAPE)), ["{label}"], [], "x")


def folder_of(path: Path, names: Sequence[str]) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), len(name)).save(path / name)
    return path


def texts(path: Path, content: dict[str, str]) -> Path:
    for name, text in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text, encoding="utf-8")
    return path


NAMES = ["001.Gull/a.png", "001.Gull/b.png", "002.Owl/a.png"]


def test_captions_of_cubs_layout(tmp_path: Path):
    """By folder and name: two images may have the same name in different folders."""
    images = build_source({"name": "folder", "path": str(folder_of(tmp_path / "images", NAMES))}).split("train")
    captions = texts(tmp_path / "text_c10", {
        "001.Gull/a.txt": "a white bird\n\n  a gull \n", "001.Gull/b.txt": "grey wings", "002.Owl/a.txt": "große Augen",
        "002.Owl/another.txt": "of no image",
    })  # fmt: skip
    assert read_captions(images, captions, "x") == [("a white bird", "a gull"), ("grey wings",), ("große Augen",)]
    (captions / "001.Gull/b.txt").write_text("\n")
    (captions / "002.Owl/a.txt").unlink()
    with pytest.raises(UsageError, match=r"2 of 3 images have no caption \(001.Gull/b.png, 002.Owl/a.png\): add them"):
        read_captions(images, captions, "x")
    with pytest.raises(UsageError, match="there is no .*nowhere: set condition.path= to a folder of .txt files"):
        read_captions(images, tmp_path / "nowhere", "x")
    (captions / "001.Gull/a.txt").write_bytes(b"\xff\xfe a")
    with pytest.raises(UsageError, match="is not UTF-8"):
        read_captions(images, captions, "x")


def test_folders_may_be_left_out_of_a_name_if_one_pair_remains():
    for images, texts_, expected in (
        (["x/a", "x/b"], ["a", "b"], {"x/a": "a", "x/b": "b"}),
        (["a"], ["x/a"], {"a": "x/a"}),
        (["train/x/a", "train/y/a"], ["x/a", "y/a"], {"train/x/a": "x/a", "train/y/a": "y/a"}),
        (["x/a", "y/a"], ["x/a"], {"x/a": "x/a"}),  # and not that of another folder
        (["x/a", "y/a"], ["a"], {}),  # of which one?
        (["a"], ["x/a", "y/a"], {}),
        (["x/ba"], ["a"], {}),
    ):
        assert _pairs(images, dict.fromkeys(texts_)) == expected


@pytest.mark.parametrize("archive", [False, True])
def test_captions_beside_the_images(archive: bool, tmp_path: Path):
    folder = folder_of(tmp_path / "images", NAMES)
    texts(folder, {"001.Gull/a.txt": "one", "001.Gull/b.txt": "two", "002.Owl/a.txt": "three"})
    source = {"name": "folder", "path": str(folder)}
    if archive:
        with zipfile.ZipFile(tmp_path / "all.zip", "w") as file:
            for path in folder.rglob("*.*"):
                file.write(path, path.relative_to(folder))
        source = {"name": "zip", "path": str(tmp_path / "all.zip")}
    images = build_source(source).split("train")
    assert read_captions(images, None, "x") == [("one",), ("two",), ("three",)]
    assert read_captions(images.at(torch.tensor([0, 2])), None, "x") == [("one",), ("three",)]


def test_captions_of_coco(tmp_path: Path):
    """``captions_*.json`` of all splits in a folder, or one of them."""
    folder = folder_of(tmp_path / "i", ["a.png", "b.png"])
    images = build_source({"name": "folder", "path": str(folder), "labels": False})
    first = {"images": [{"id": 7, "file_name": "a.jpg"}], "annotations": [{"image_id": 7, "caption": "a  cat \n"}]}
    second = {
        "images": [{"id": 9, "file_name": "b.jpg"}],
        "annotations": [{"image_id": 9, "caption": "a dog"}, {"image_id": 9, "caption": "a puppy"}],
    }
    folder = texts(tmp_path / "annotations", {
        "captions_train2017.json": json.dumps(first), "captions_val2017.json": json.dumps(second), "other.json": "{",
    })  # fmt: skip
    assert read_captions(images.split("train"), folder, "x") == [("a cat",), ("a dog", "a puppy")]
    with pytest.raises(UsageError, match="1 of 2 images have no caption .b.png"):
        read_captions(images.split("train"), folder / "captions_train2017.json", "x")
    (folder / "captions_val2017.json").write_text('{"images": []}')
    with pytest.raises(UsageError, match="captions_val2017.json can't be read as COCO's captions .KeyError"):
        read_captions(images.split("train"), folder, "x")


def test_captions_of_an_npz_file(tmp_path: Path):
    """They go with the images through splits by hash and limits; shorter rows end in empty texts."""
    arrays = np.random.default_rng(0).integers(0, 256, (40, 4, 4), dtype=np.uint8)
    captions = np.array([[f"image {i}", "second" if i % 2 else ""] for i in range(40)])
    np.savez(tmp_path / "a.npz", images=arrays, captions=captions)
    path = str(tmp_path / "a.npz")
    images = build_source({"name": "npz", "path": path}).split("train")
    assert read_captions(images, None, "x")[:2] == [("image 0",), ("image 1", "second")] and not images.notes
    assert len(read_captions(images.some(5), None, "x")) == 5
    shared = build_source({"name": "npz", "path": path, "test_share": 0.3})
    for split in ("train", "test"):
        own = shared.split(split)
        for pixels, texts_ in zip(own.images[:, 0].numpy(), own.captions, strict=True):
            assert np.array_equal(pixels, arrays[int(texts_[0].removeprefix("image "))])
    for wrong, words in (
        (captions[:-1], r"'captions' is .* \(39, 2\): save text, \(40,\) or \(40, K\)"),
        (np.zeros(40), "'captions' is float64"),
        (np.where(np.arange(40) == 3, "", "x"), "1 images, the first is 3, have no caption"),
    ):
        np.savez(tmp_path / "b.npz", images=arrays, captions=wrong)
        with pytest.raises(UsageError, match=words):
            build_source({"name": "npz", "path": str(tmp_path / "b.npz")}).split("train")
    np.savez(tmp_path / "c.npz", images=arrays)
    plain = build_source({"name": "npz", "path": str(tmp_path / "c.npz")}).split("train")
    with pytest.raises(UsageError, match="the images of x have no captions: save an array 'captions' in the npz"):
        read_captions(plain, None, "x")
    with pytest.raises(UsageError, match="no file names, by which captions are paired with images"):
        read_captions(plain, tmp_path, "x")


# --- Embeddings on disk


def test_embeddings_are_computed_once(tmp_path: Path):
    encoder, captions = Letters(), ["ab", "a long caption"]
    for _ in range(2):
        found = embed(captions, encoder, tmp_path).condition(torch.tensor([1, 0, 1]))
        assert text_of(found.tokens, found.valid) == ["a long c", "ab", "a long c"]
        assert found.tokens.shape == (3, 8, 2) and found.tokens.dtype == torch.float32
        assert not found.tokens[~found.valid].any()
    assert encoder.encoded == captions
    embed([*captions, "new"], encoder, tmp_path)
    assert encoder.encoded[2:] == [*captions, "new"], "other captions are other files"


@pytest.mark.parametrize("damage", ["tokens", "ends", "both"])
def test_incomplete_files_are_written_again(damage: str, tmp_path: Path):
    encoder, captions = Letters(), ["ab", "c"]
    embed(captions, encoder, tmp_path)
    base = tmp_path / key_of(captions, encoder)
    if damage != "ends":
        base.with_suffix(".f16").write_bytes(base.with_suffix(".f16").read_bytes()[:-2])
    if damage != "tokens":
        base.with_suffix(".npy").write_bytes(b"\x93NUMPY")
    found = embed(captions, encoder, tmp_path).condition(torch.tensor([0, 1]))
    assert text_of(found.tokens, found.valid) == captions and len(encoder.encoded) == 4


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    found = embed(["ab"], Letters(), tmp_path / "file" / "cache").condition(torch.tensor([0]))
    assert text_of(found.tokens, found.valid) == ["ab"]
    assert "can't be written to" in capsys.readouterr().err


def test_the_cache_is_that_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "diffaccel" / "captions"
    assert Captions(SHAPE, {"name": "clip"}).cache == default_folder() and Captions(SHAPE).cache is None


def test_an_encoder_of_another_width_is_refused():
    encoder = Letters()
    encoder.dim = 3
    with pytest.raises(UsageError, match="the text encoder returned .2, 2. for a caption of 1 to 8 tokens of width 3"):
        embed(["ab"], encoder)


# --- The condition


def conditioner(**keys: object) -> Captions:
    templates = ["a {label}", "b {label}", "c {label}"]
    found = CONDITIONERS.build({"name": "captions", "templates": templates, **keys}, shape=SHAPE)
    assert isinstance(found, Captions)
    found.encoder = Letters()
    return found


def test_an_image_has_one_of_its_captions_by_its_noise():
    """All of them equally often, and the same one in any batch."""
    images = labelled([0, 1, 2] * 200)
    conditions = conditioner().open("train", images)
    index = torch.arange(600)
    found = text_of(*conditions(images.images, index, NoiseStreams(0, index, "condition"))[1:3])
    assert all(text[2:] == str(label) for text, label in zip(found, images.labels.tolist(), strict=True))
    counts = torch.tensor([sum(text[0] == letter for text in found) for letter in "abc"])
    assert (counts - 200).abs().max() < 50
    part = torch.tensor([599, 3])
    again = text_of(*conditions(images.images[part], part, NoiseStreams(0, part, "condition"))[1:3])
    assert again == [found[599], found[3]]
    later = text_of(*conditions(images.images, index, NoiseStreams(0, index + 600, "condition"))[1:3])
    assert later != found, "another caption in another epoch"


def test_captions_are_embedded_before_workers_start():
    one = conditioner()
    encoder = one.encoder
    assert one.open("train", labelled([0, 1])) is one.open("train", labelled([0, 1]))
    assert not encoder.encoded, "not for a dry run"
    one.prepare()
    assert sorted(encoder.encoded) == ["a 0", "a 1", "b 0", "b 1", "c 0", "c 1"]


def test_sampled_images_have_the_captions_of_test_images():
    inputs = HeldOut(CONDITIONERS.build({"name": "captions", "templates": ["{label}"]}, shape=(1, 8, 8)),
                     build_source({"name": "digits"}), samples=3)  # fmt: skip
    inputs.conditioner.encoder = Letters()
    labels = build_source({"name": "digits"}).split("test").labels[inputs.order]
    found = inputs.condition(range(2, 11))
    assert text_of(found.tokens, found.valid) == [str(labels[i // 3].item()) for i in range(2, 11)]
    assert torch.equal(inputs.labels(range(11)), labels[torch.arange(11) // 3])
    identity = inputs.identity(6)
    assert {"sha256", "samples", "seed", "captions", "encoder"} == identity.keys()
    inputs.conditioner.templates = ["the {label}"]
    other = HeldOut(inputs.conditioner, build_source({"name": "digits"}), samples=3)
    assert other.identity(6)["captions"] != identity["captions"]


def test_a_given_caption_takes_no_images():
    given = Captions(SHAPE, caption="a seven").given()
    found = given.condition(range(4, 7))
    assert torch.equal(found.tokens[0, :2], Words().encode(["a seven"]).__next__().float())
    assert found.size == 3 and found.valid.sum(1).tolist() == [2, 2, 2]
    assert given.identity(3) != Captions(SHAPE, caption="a six").given().identity(3)
    assert Captions(SHAPE).given() is None and given.labels(range(3)) is None
    with pytest.raises(UsageError, match="caption='  ': give a text"):
        Captions(SHAPE).of_text(["  "])
    with pytest.raises(UsageError, match="give at most 10000 characters"):
        Captions(SHAPE).of_text(["x" * 10_001])


def test_keys_that_exclude_each_other(tmp_path: Path):
    with pytest.raises(UsageError, match="both templates and path are set: remove one"):
        Captions(SHAPE, templates=["{label}"], path=tmp_path)
    with pytest.raises(UsageError, match="condition.templates: 'a digit' has no {label}"):
        Captions(SHAPE, templates=["{label}", "a digit"])
    with pytest.raises(UsageError, match="no encoder is called 'word'"):
        Captions(SHAPE, {"name": "word"})
