"""ImageReward on a small model, laid out on disk as the real one is, against a forward written out here."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, softmax
from transformers import BertTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dgpo_fast import load_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.records import Prompt
from dgpo_fast.rewards import Reward, load_reward
from dgpo_fast.rewards.imagereward import IMAGES_PER_FORWARD

VISION, TEXT, SIZE, PATCH = 128, 48, 32, 16
MED = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu", "hidden_size": TEXT,
    "intermediate_size": 96, "num_attention_heads": 3, "num_hidden_layers": 2, "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64, "pad_token_id": 0, "vocab_size": 42, "type_vocab_size": 2, "encoder_width": 999,
    "add_cross_attention": True, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
"""As med_config.json has them. The published encoder_width is wrong for the published model: the code overwrites it."""
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "cube", "##s", "a", ",", *"bcdefghijklmnopqrstuvwxyz"]
PROMPTS = ("a red cube", "Red  CUBES, a cube", "", "q " * 60)
"""The last is cut at 35 tokens."""
ROUNDINGS = 128 * 2**-24
"""How far two ways to compute a score near 1 may round apart in float32, in two layers of each encoder and the head."""


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Random weights by the names of the published checkpoint, and in its shapes but for widths and depths."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, VISION), "pos_embed": (1, (SIZE // PATCH) ** 2 + 1, VISION),
        "patch_embed.proj.weight": (VISION, 3, PATCH, PATCH), "patch_embed.proj.bias": (VISION,),
        **norm("norm.", VISION),
    }  # fmt: skip
    for layer in range(2):
        start = f"blocks.{layer}."
        shapes |= norm(f"{start}norm1.", VISION) | norm(f"{start}norm2.", VISION)
        shapes |= dense(f"{start}attn.qkv.", VISION, 3 * VISION) | dense(f"{start}attn.proj.", VISION, VISION)
        shapes |= dense(f"{start}mlp.fc1.", VISION, 4 * VISION) | dense(f"{start}mlp.fc2.", 4 * VISION, VISION)
    shapes = {f"visual_encoder.{name}": shape for name, shape in shapes.items()}
    shapes |= {"text_encoder.embeddings.word_embeddings.weight": (42, TEXT)}
    shapes |= {"text_encoder.embeddings.position_embeddings.weight": (64, TEXT)}
    shapes |= norm("text_encoder.embeddings.LayerNorm.", TEXT)
    for layer in range(2):
        start = f"text_encoder.encoder.layer.{layer}."
        for kind, seen in (("attention", TEXT), ("crossattention", VISION)):
            shapes |= dense(f"{start}{kind}.self.query.", TEXT, TEXT) | dense(f"{start}{kind}.self.key.", seen, TEXT)
            shapes |= dense(f"{start}{kind}.self.value.", seen, TEXT)
            shapes |= dense(f"{start}{kind}.output.dense.", TEXT, TEXT) | norm(f"{start}{kind}.output.LayerNorm.", TEXT)
        shapes |= dense(f"{start}intermediate.dense.", TEXT, 96) | dense(f"{start}output.dense.", 96, TEXT)
        shapes |= norm(f"{start}output.LayerNorm.", TEXT)
    shapes |= dense("vision_proj.", VISION, 8) | dense("text_proj.", TEXT, 8)  # of BLIP's pre-training, not used
    shapes = {f"blip.{name}": shape for name, shape in shapes.items()}
    widths = (TEXT, 1024, 128, 64, 16, 1)
    for number, (width, new_width) in zip((0, 2, 4, 6, 7), itertools.pairwise(widths), strict=True):
        shapes |= dense(f"mlp.layers.{number}.", width, new_width)
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 25
        made[name] = torch.randn(shape, generator=generator) * fan_in**-0.5
        if "norm" in name.lower() and name.endswith("weight"):
            made[name] += 1
        if any(part in name for part in ("cls_token", "pos_embed", "patch_embed")):
            made[name] *= 0.05  # as small as trained ones, so that the first normalisation's epsilon is felt
    return made | {"blip.text_encoder.embeddings.position_ids": torch.arange(64)[None]}


def dense(prefix: str, width: int, new_width: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}weight": (new_width, width), f"{prefix}bias": (new_width,)}


def norm(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}weight": (width,), f"{prefix}bias": (width,)}


@pytest.fixture(scope="module")
def directory(state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The hub's two files, and the tokenizer in a folder of its own."""
    found = tmp_path_factory.mktemp("weights")
    torch.save(state, found / "ImageReward.pt")
    (found / "med_config.json").write_text(json.dumps(MED))
    BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}).save_pretrained(found / "bert")
    (found / "bert" / "tokenizer_config.json").unlink()
    return found


@pytest.fixture(scope="module")
def images() -> Tensor:
    """8-bit images as float32 in [0, 1], [4, 3, 70, 46]: not square, and not of the model's size."""
    return torch.randint(256, (len(PROMPTS), 3, 70, 46), generator=torch.Generator().manual_seed(1)) / 255


def load(path: Path, tokenizer_path: Path) -> Reward:
    overrides = [f"rewards.imagereward.path={path}", f"rewards.imagereward.tokenizer_path={tokenizer_path}"]
    return load_reward("imagereward", load_recipe("tiny-dgpo", overrides).rewards)


def score(reward: Reward, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
    scores = reward(images_BCHW, prompts)
    assert isinstance(scores, Tensor)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    return scores


# The published model, written out


class Weights:
    """Layers by the names of the checkpoint."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        self.state, self.prefix = state, prefix

    def within(self, name: str) -> Weights:
        return Weights(self.state, f"{self.prefix}{name}.")

    def dense(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.state[f"{self.prefix}{name}.weight"], self.state[f"{self.prefix}{name}.bias"])

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        weight, bias = (self.state[f"{self.prefix}{name}.{kind}"] for kind in ("weight", "bias"))
        return layer_norm(x, weight.shape, weight, bias, eps)


def attention(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, mask: Tensor | None = None) -> Tensor:
    q, k, v = (part.unflatten(1, (num_heads, -1)).transpose(0, 1) for part in (q, k, v))
    logits = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return (softmax(logits, -1) @ v).transpose(0, 1).flatten(1)


def look(pixels: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The vision transformer: tokens of an image, [5, VISION], behind the last normalisation."""
    model = Weights(state, "blip.visual_encoder.")
    proj = model.within("patch_embed.proj")
    weight, bias = (state[f"{proj.prefix}{kind}"] for kind in ("weight", "bias"))
    patches = nn.functional.conv2d(pixels, weight, bias, stride=PATCH).flatten(2)[0].T
    x = torch.cat([state["blip.visual_encoder.cls_token"][0], patches]) + state["blip.visual_encoder.pos_embed"][0]
    for layer in range(2):
        block = model.within(f"blocks.{layer}")
        q, k, v = block.dense("attn.qkv", block.norm("norm1", x, 1e-6)).chunk(3, dim=1)
        x = x + block.dense("attn.proj", attention(q, k, v, num_heads=2))
        x = x + block.dense("mlp.fc2", gelu(block.dense("mlp.fc1", block.norm("norm2", x, 1e-6))))
    return model.norm("norm", x, 1e-6)


def read(tokens: Tensor, mask: Tensor, seen: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """The text encoder: what it knows at the first token, [TEXT]."""
    model = Weights(state, "blip.text_encoder.")
    words, positions = (state[f"{model.prefix}embeddings.{kind}_embeddings.weight"] for kind in ("word", "position"))
    x = model.norm("embeddings.LayerNorm", words[tokens] + positions[: len(tokens)], 1e-12)
    for layer in range(2):
        block = model.within(f"encoder.layer.{layer}")
        for kind, source, source_mask in (("attention", None, mask), ("crossattention", seen, None)):
            part, source = block.within(kind), x if source is None else source
            q = part.dense("self.query", x)
            k, v = part.dense("self.key", source), part.dense("self.value", source)
            mixed = part.dense("output.dense", attention(q, k, v, num_heads=3, mask=source_mask))
            x = part.norm("output.LayerNorm", x + mixed, 1e-12)
        h = block.dense("output.dense", gelu(block.dense("intermediate.dense", x)))
        x = block.norm("output.LayerNorm", x + h, 1e-12)
    return x[0]


def expected_score(image_CHW: Tensor, prompt: str, tokenizer: BertTokenizer, state: Mapping[str, Tensor]) -> Tensor:
    """Padded to 35 tokens, as the authors do it. 70 x 46 pixels become 48 x 32, of which 8 above are cut."""
    picture = Image.fromarray((image_CHW * 255).round().byte().permute(1, 2, 0).numpy())
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    pixels = processor(images=picture, return_tensors="pt").pixel_values
    tokens = tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    x = read(tokens.input_ids[0], tokens.attention_mask[0].bool(), look(pixels, state), state)
    for number in (0, 2, 4, 6, 7):
        x = Weights(state, "mlp.layers.").dense(str(number), x)
    return (x[0] - 0.16717362830052426) / 1.0333394966054072


def test_the_published_model(directory: Path, state: dict[str, Tensor], images: Tensor) -> None:
    tokenizer = BertTokenizer.from_pretrained(directory / "bert")
    expected = torch.stack([
        expected_score(image, prompt, tokenizer, state) for image, prompt in zip(images, PROMPTS, strict=True)
    ])  # fmt: skip
    found = score(load(directory, directory / "bert"), images, PROMPTS)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDINGS)
    assert expected.std() > 1000 * ROUNDINGS


def test_a_batch_is_its_images(directory: Path) -> None:
    """More than one forward takes, with prompts of all lengths, each with metadata."""
    num_images = IMAGES_PER_FORWARD + 5
    batch = torch.rand(num_images, 3, 40, 40, generator=torch.Generator().manual_seed(2))
    prompts = [Prompt(text, {"tag": "color"}) for text in itertools.islice(itertools.cycle(PROMPTS), num_images)]
    reward = load(directory, directory / "bert")
    one_by_one = torch.cat([score(reward, batch[i : i + 1], prompts[i : i + 1]) for i in range(num_images)])
    torch.testing.assert_close(score(reward, batch, prompts), one_by_one, rtol=0, atol=ROUNDINGS)
    assert one_by_one.std() > 1000 * ROUNDINGS


def test_both_the_image_and_the_prompt_matter(directory: Path, images: Tensor) -> None:
    reward = load(directory, directory / "bert")
    scores = score(reward, images[[0, 1, 0]], [PROMPTS[0], PROMPTS[0], PROMPTS[1]])
    assert scores.sort().values.diff().min() > 1000 * ROUNDINGS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blip.visual_encoder.pos_embed": None}, "has no ImageReward: 'blip.visual_encoder.pos_embed' is missing"),
        ({"blip.visual_encoder.blocks.1.norm2.bias": None}, r"is no BlipVisionModel .* 1 weights are missing .*norm2"),
        (
            {"blip.text_encoder.encoder.layer.1.crossattention.self.key.weight": torch.zeros(TEXT, TEXT)},
            r"is no BlipTextModel .* 1 weights .*layer\.1\.crossattention\.self\.key\.weight$",
        ),
        ({"mlp.layers.7.weight": None}, r"the checkpoint has no layer mlp\.layers\.7"),
    ],
)
def test_another_checkpoint(
    change: Mapping[str, Tensor | None], message: str, state: dict[str, Tensor], directory: Path, tmp_path: Path
) -> None:
    changed = {name: weight for name, weight in (state | change).items() if weight is not None}
    torch.save(changed, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps(MED))
    refused(lambda: load(tmp_path, directory / "bert"), rf"^rewards\.imagereward\.path: .*{message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "med_config.json cannot be read: Expecting property name"),
        (json.dumps({**MED, "hidden_size": 96}), r"is no BlipTextModel .* \d+ weights are missing or of another shape"),
        (json.dumps({"hidden_size": TEXT}), "has no ImageReward: 'vocab_size' is missing"),
    ],
)
def test_another_configuration(
    text: str, message: str, state: dict[str, Tensor], directory: Path, tmp_path: Path
) -> None:
    torch.save(state, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(text)
    refused(lambda: load(tmp_path, directory / "bert"), rf"^rewards\.imagereward\.path: .*{message}")


def refused(load: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load()
    assert "\n" not in str(error.value)
