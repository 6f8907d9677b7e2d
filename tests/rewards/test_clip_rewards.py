"""PickScore, CLIPScore, HPS v2.1 and the aesthetic predictor on small models, laid out on disk as the real ones are."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, softmax
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dgpo_fast import load_recipe
from dgpo_fast.errors import UserError
from dgpo_fast.records import Prompt
from dgpo_fast.rewards import Reward, load_reward
from dgpo_fast.rewards.clip import IMAGES_PER_FORWARD
from dgpo_fast.rewards.scoring import Scorer

SIZE, WIDTH = 28, 32
"""Of a small CLIP: pixels that it sees, and its embeddings' width."""
PROMPTS = ("a red cube", "Two  GREEN spheres, left of a cat", "an old man's hat", "", "word " * 200)
"""The last is cut at 77 tokens."""
SUM = 64 * 2**-24
"""How far two ways to compute a number near 1 may round apart in float32 in a model of two layers."""


# What the authors publish, but small


def write_tokenizer(directory: Path) -> None:
    """CLIP's files: letters, letters that end a word, two merges, and the two special tokens with the last numbers."""
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[("r", "e"), ("re", "d</w>")])
    tokenizer.save_pretrained(directory)
    file = directory / "tokenizer.json"
    saved = json.loads(file.read_text())
    saved["model"]["merges"] = [" ".join(merge) for merge in saved["model"]["merges"]]  # as versions of 2023 wrote them
    file.write_text(json.dumps(saved))
    (directory / "tokenizer_config.json").unlink()


VOCABULARY = 516


def write_clip(directory: Path, *, seed: int = 0, width: int = WIDTH) -> Path:
    """A directory in transformers' format: a random CLIP whose scores differ, with its tokenizer."""
    directory.mkdir(parents=True)
    tower = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=width, vision_config={**tower, "image_size": SIZE, "patch_size": 7},
        text_config={**tower, "vocab_size": VOCABULARY, "bos_token_id": 514, "eos_token_id": 515, "pad_token_id": 515},
    )  # fmt: skip
    model = CLIPModel(config)
    randomise(model.state_dict(), seed=seed)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def randomise(state: Mapping[str, Tensor], *, seed: int) -> None:
    """Fills matrices and vectors so that signals neither vanish nor explode; logit_scale becomes log 100."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in state.items():
        if name == "logit_scale":
            weight.fill_(4.6052)
        elif weight.is_floating_point():
            fan_in = weight[0].numel() if weight.ndim > 1 else 25
            weight.normal_(std=fan_in**-0.5, generator=generator)
            if weight.ndim == 1 and ("norm" in name or "ln_" in name) and name.endswith("weight"):
                weight.add_(1)


@pytest.fixture(scope="module")
def clip_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("weights") / "clip")


@pytest.fixture(scope="module")
def images() -> Tensor:
    """8-bit images as float32 in [0, 1], [5, 3, 60, 42]: not square, and not of the model's size."""
    return torch.randint(256, (len(PROMPTS), 3, 60, 42), generator=torch.Generator().manual_seed(1)) / 255


def load(name: str, **settings: Path) -> Reward:
    """As a recipe loads it: rewards.NAME.path=DIR and so on."""
    paths = [f"rewards.{name}.{key}={directory}" for key, directory in settings.items()]
    config = load_recipe("tiny-dgpo", [f"rewards.terms=[{{name: {name}}}]", *paths]).rewards
    return load_reward(name, config)


def score(reward: Reward, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
    scores = reward(images_BCHW, prompts)
    assert isinstance(scores, Tensor)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    return scores


def in_pillow(image_CHW: Tensor) -> Image.Image:
    return Image.fromarray((image_CHW * 255).round().byte().permute(1, 2, 0).numpy())


def pixels(image_CHW: Tensor) -> Tensor:
    """What transformers' own processor makes of an image."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return processor(images=in_pillow(image_CHW), return_tensors="pt").pixel_values


def plain_logits(directory: Path, images_BCHW: Tensor, prompts: Sequence[str]) -> Tensor:
    """One image and its prompt after another, through transformers as its documentation shows it."""
    model, tokenizer = CLIPModel.from_pretrained(directory), CLIPTokenizer.from_pretrained(directory)
    logits = []
    for image_CHW, prompt in zip(images_BCHW, prompts, strict=True):
        tokens = tokenizer(str(prompt), padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            logits.append(model(**tokens, pixel_values=pixels(image_CHW)).logits_per_image[0, 0])
    return torch.stack(logits)


# Every one of them


@pytest.fixture(scope="module")
def loaders(clip_directory: Path, hps_directory: Path, aesthetic_head: Path) -> Mapping[str, Callable[[], Reward]]:
    return {
        "pickscore": lambda: load("pickscore", path=clip_directory),
        "clipscore": lambda: load("clipscore", path=clip_directory),
        "hpsv2": lambda: load("hpsv2", path=hps_directory, tokenizer_path=clip_directory),
        "aesthetic": lambda: load("aesthetic", path=aesthetic_head, clip_path=clip_directory),
    }


NAMES = ("pickscore", "clipscore", "hpsv2", "aesthetic")


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_its_images(name: str, loaders: Mapping[str, Callable[[], Reward]]) -> None:
    """More than one forward takes, with prompts that come again, each with metadata."""
    num_images = 2 * IMAGES_PER_FORWARD + 3
    batch = torch.rand(num_images, 3, 30, 30, generator=torch.Generator().manual_seed(2))
    prompts = [Prompt(text, {"tag": "color"}) for text in itertools.islice(itertools.cycle(PROMPTS), num_images)]
    reward = loaders[name]()
    together = score(reward, batch, prompts)
    one_by_one = torch.cat([score(reward, batch[i : i + 1], prompts[i : i + 1]) for i in range(num_images)])
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=100 * SUM)
    assert together.std() > 1000 * SUM


@pytest.mark.parametrize("name", NAMES)
def test_it_scores_as_a_recipes_reward(
    name: str, loaders: Mapping[str, Callable[[], Reward]], images: Tensor, clip_directory: Path, hps_directory: Path,
    aesthetic_head: Path,
) -> None:  # fmt: skip
    """The scorer hands it its section, which says where its weights are."""
    paths = {
        "pickscore": {"path": clip_directory}, "clipscore": {"path": clip_directory},
        "hpsv2": {"path": hps_directory, "tokenizer_path": clip_directory},
        "aesthetic": {"path": aesthetic_head, "clip_path": clip_directory},
    }[name]  # fmt: skip
    overrides = [f"rewards.{name}.{key}={directory}" for key, directory in paths.items()]
    config = load_recipe("tiny-dgpo", [f"rewards.terms=[{{name: {name}, weight: 0.5}}]", *overrides]).rewards
    scores = Scorer(config)(images, PROMPTS)
    assert torch.equal(scores.metrics[name], score(loaders[name](), images, PROMPTS))
    assert torch.equal(scores.reward_B, 0.5 * scores.metrics[name])


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "hpsv2"])
def test_a_groups_prompt_is_encoded_once(
    name: str, loaders: Mapping[str, Callable[[], Reward]], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, encode = [], CLIPModel.get_text_features

    def counted(self: CLIPModel, input_ids: Tensor, **others: Any) -> Any:
        encoded.append(len(input_ids))
        return encode(self, input_ids, **others)

    monkeypatch.setattr(CLIPModel, "get_text_features", counted)
    score(loaders[name](), torch.rand(24, 3, 28, 28), [text for text in PROMPTS[:3] for _ in range(8)])
    assert encoded == [3]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["pickscore", "clipscore"])
def test_on_a_gpu_images_may_lie_elsewhere(name: str, clip_directory: Path, images: Tensor) -> None:
    """In float16: a cosine of 32 products, each of numbers that two layers have rounded to 2**-11."""
    config = load_recipe(
        "tiny-dgpo", [f"rewards.terms=[{{name: {name}}}]", f"rewards.{name}.path={clip_directory}"]
    ).rewards
    on_gpu = load_reward(name, config, device="cuda")
    expected = plain_logits(clip_directory, images, PROMPTS)
    for device in ("cpu", "cuda"):
        found = score(on_gpu, images.to(device), PROMPTS)
        assert found.device.type == "cuda"
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=100 * 16 * 2**-11)


# PickScore and CLIPScore


@pytest.mark.parametrize("name", ["pickscore", "clipscore"])
def test_the_logit_of_transformers_own_model(name: str, clip_directory: Path, images: Tensor) -> None:
    found = score(load(name, path=clip_directory), images, PROMPTS)
    expected = plain_logits(clip_directory, images, PROMPTS)
    torch.testing.assert_close(found, expected, rtol=0, atol=100 * SUM)
    assert expected.std() > 1000 * 100 * SUM


def test_another_prompt_is_another_score(clip_directory: Path, images: Tensor) -> None:
    reward = load("pickscore", path=clip_directory)
    assert (score(reward, images, PROMPTS) - score(reward, images, PROMPTS[::-1])).abs().max() > 1


# HPS v2.1


def block_names(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}ln_1.weight": (width,), f"{prefix}ln_1.bias": (width,),
        f"{prefix}attn.in_proj_weight": (3 * width, width), f"{prefix}attn.in_proj_bias": (3 * width,),
        f"{prefix}attn.out_proj.weight": (width, width), f"{prefix}attn.out_proj.bias": (width,),
        f"{prefix}ln_2.weight": (width,), f"{prefix}ln_2.bias": (width,),
        f"{prefix}mlp.c_fc.weight": (4 * width, width), f"{prefix}mlp.c_fc.bias": (4 * width,),
        f"{prefix}mlp.c_proj.weight": (width, 4 * width), f"{prefix}mlp.c_proj.bias": (width,),
    }  # fmt: skip


@pytest.fixture(scope="module")
def open_clip_state() -> dict[str, Tensor]:
    """Random weights by the names and in the shapes of open_clip's ViT-H-14, but two heads wide and two layers deep."""
    vision, text = 160, 128
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, text), "text_projection": (text, WIDTH), "logit_scale": (),
        "visual.class_embedding": (vision,), "visual.positional_embedding": (5, vision), "visual.proj": (vision, WIDTH),
        "visual.conv1.weight": (vision, 3, 14, 14), "visual.ln_pre.weight": (vision,), "visual.ln_pre.bias": (vision,),
    }  # fmt: skip
    for layer in range(2):
        shapes |= block_names(f"visual.transformer.resblocks.{layer}.", vision)
        shapes |= block_names(f"transformer.resblocks.{layer}.", text)
    shapes |= {"visual.ln_post.weight": (vision,), "visual.ln_post.bias": (vision,)}
    shapes |= {"token_embedding.weight": (VOCABULARY, text), "ln_final.weight": (text,), "ln_final.bias": (text,)}
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    randomise(state, seed=3)
    return state


@pytest.fixture(scope="module")
def hps_directory(open_clip_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("weights")
    torch.save({"epoch": 1, "name": "HPS", "state_dict": open_clip_state}, directory / "HPS_v2.1_compressed.pt")
    return directory


def open_clip_block(x_ND: Tensor, state: Mapping[str, Tensor], *, num_heads: int, causal: bool) -> Tensor:
    """x + attention(LN x), then + MLP(LN x), with torch's own multi-head attention on the fused weight."""
    tokens, width = x_ND.shape
    h = layer_norm(x_ND, (width,), state["ln_1.weight"], state["ln_1.bias"])
    q, k, v = linear(h, state["attn.in_proj_weight"], state["attn.in_proj_bias"]).split(width, dim=1)
    q, k, v = (part.view(tokens, num_heads, -1).transpose(0, 1) for part in (q, k, v))
    logits = q @ k.transpose(1, 2) / (width // num_heads) ** 0.5
    if causal:
        logits = logits + torch.full((tokens, tokens), -torch.inf).triu(1)
    mixed = (softmax(logits, -1) @ v).transpose(0, 1).reshape(tokens, width)
    x_ND = x_ND + linear(mixed, state["attn.out_proj.weight"], state["attn.out_proj.bias"])
    h = layer_norm(x_ND, (width,), state["ln_2.weight"], state["ln_2.bias"])
    h = gelu(linear(h, state["mlp.c_fc.weight"], state["mlp.c_fc.bias"]))
    return x_ND + linear(h, state["mlp.c_proj.weight"], state["mlp.c_proj.bias"])


def open_clip_tower(x_ND: Tensor, state: Mapping[str, Tensor], prefix: str, **settings: Any) -> Tensor:
    for layer in range(2):
        start = f"{prefix}transformer.resblocks.{layer}."
        block = {name.removeprefix(start): weight for name, weight in state.items() if name.startswith(start)}
        x_ND = open_clip_block(x_ND, block, **settings)
    return x_ND


def open_clip_image(image_CHW: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    """open_clip's VisionTransformer, on an image that torchvision's transforms have prepared as a tensor."""
    resized = nn.functional.interpolate(image_CHW[None], size=(40, SIZE), mode="bicubic", antialias=True)[:, :, 6:34]
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    normalised = (resized - mean[:, None, None]) / std[:, None, None]
    patches = nn.functional.conv2d(normalised, state["visual.conv1.weight"], stride=14).flatten(2)[0].T
    x_ND = torch.cat([state["visual.class_embedding"][None], patches]) + state["visual.positional_embedding"]
    x_ND = layer_norm(x_ND, (160,), state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x_ND = open_clip_tower(x_ND, state, "visual.", num_heads=2, causal=False)
    return (
        layer_norm(x_ND[0], (160,), state["visual.ln_post.weight"], state["visual.ln_post.bias"]) @ state["visual.proj"]
    )


def open_clip_text(prompt: str, tokenizer: CLIPTokenizer, state: Mapping[str, Tensor]) -> Tensor:
    """open_clip's text transformer: 77 tokens, zeros behind the last, read at the highest number."""
    found = tokenizer(prompt, truncation=True, max_length=77).input_ids
    tokens = torch.tensor(found + [0] * (77 - len(found)))
    x_ND = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    x_ND = open_clip_tower(x_ND, state, "", num_heads=2, causal=True)
    x_ND = layer_norm(x_ND, (128,), state["ln_final.weight"], state["ln_final.bias"])
    return x_ND[tokens.argmax()] @ state["text_projection"]


def test_hps_is_the_cosine_of_open_clips_model(
    hps_directory: Path, clip_directory: Path, open_clip_state: dict[str, Tensor], images: Tensor
) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(clip_directory)
    expected = torch.stack([
        nn.functional.cosine_similarity(
            open_clip_image(image_CHW, open_clip_state), open_clip_text(prompt, tokenizer, open_clip_state), dim=0
        )
        for image_CHW, prompt in zip(images, PROMPTS, strict=True)
    ])  # fmt: skip
    found = score(load("hpsv2", path=hps_directory, tokenizer_path=clip_directory), images, PROMPTS)
    torch.testing.assert_close(found, expected, rtol=0, atol=SUM)
    assert expected.std() > 1000 * SUM


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: {**state, "visual.attn_pool.query": torch.zeros(1)},
            "'visual.attn_pool.query' is missing or un",
        ),
        (lambda state: without(state, "visual.conv1.weight"), "'visual.conv1.weight' is missing or unknown"),
        (
            lambda state: without(state, "visual.transformer.resblocks.1.mlp.c_fc.bias"),
            r"1 weights .*layers\.1\.mlp\.fc1",
        ),
        (lambda state: {**state, "ln_final.bias": torch.zeros(3)}, r"1 weights .* text_model\.final_layer_norm\.bias$"),
        (lambda state: [1, 2], "holds no state_dict"),
    ],
)
def test_another_checkpoint_than_hps(
    change: Callable[[dict[str, Tensor]], Any], message: str, open_clip_state: dict[str, Tensor], tmp_path: Path,
    clip_directory: Path,
) -> None:  # fmt: skip
    torch.save(change(open_clip_state), tmp_path / "HPS_v2.1_compressed.pt")
    refused(lambda: load("hpsv2", path=tmp_path, tokenizer_path=clip_directory), f"^rewards.hpsv2.path: .*{message}")


def without(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {other: weight for other, weight in state.items() if other != name}


class Harmful:
    """What unpickling would execute."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def test_nothing_in_a_checkpoint_is_executed(
    tmp_path: Path, clip_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Harmful()}, tmp_path / "HPS_v2.1_compressed.pt")
    refused(
        lambda: load("hpsv2", path=tmp_path, tokenizer_path=clip_directory),
        "cannot be read: UnpicklingError: Weights only load failed",
    )
    assert not Path("executed").exists()


# The aesthetic predictor


@pytest.fixture(scope="module")
def aesthetic_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the head: the published Sequential, with dropout at 1, 3 and 5, of a small embedding."""
    directory = tmp_path_factory.mktemp("weights")
    head = aesthetic_layers(WIDTH)
    torch.save(head.state_dict(prefix="layers."), directory / "sac+logos+ava1-l14-linearMSE.pth")
    return directory


def aesthetic_layers(width: int) -> nn.Sequential:
    layers = nn.Sequential(
        nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2), nn.Linear(128, 64),
        nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip
    randomise(layers.state_dict(), seed=4)
    return layers.eval()


def test_aesthetic_is_the_published_head_of_transformers_embedding(
    aesthetic_head: Path, clip_directory: Path, images: Tensor
) -> None:
    """Whatever the prompts are."""
    model, layers = CLIPModel.from_pretrained(clip_directory), aesthetic_layers(WIDTH)
    with torch.no_grad():
        embeddings = [model.get_image_features(pixels(image)).pooler_output[0] for image in images]
        expected = torch.cat([layers(embedding / embedding.norm()) for embedding in embeddings])
    reward = load("aesthetic", path=aesthetic_head, clip_path=clip_directory)
    found = score(reward, images, PROMPTS)
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * SUM)
    assert expected.std() > 1000 * SUM
    assert torch.equal(found, score(reward, images, PROMPTS[::-1]))


def test_a_clip_that_the_head_does_not_fit(aesthetic_head: Path, tmp_path: Path) -> None:
    other = write_clip(tmp_path / "clip", width=24)
    refused(
        lambda: load("aesthetic", path=aesthetic_head, clip_path=other),
        r"^rewards\.aesthetic\.clip_path: embeddings of 24 numbers, where the head of .*linearMSE\.pth expects 32; "
        "expected the model openai/clip-vit-large-patch14",
    )


def test_a_head_with_a_layer_less(tmp_path: Path, clip_directory: Path) -> None:
    state = without(aesthetic_layers(WIDTH).state_dict(prefix="layers."), "layers.4.bias")
    torch.save(state, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    refused(
        lambda: load("aesthetic", path=tmp_path, clip_path=clip_directory),
        r"^rewards\.aesthetic\.path: the checkpoint has no layer layers\.4",
    )


# Directories that have something else


def refused(load: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["pickscore", "clipscore"])
def test_a_directory_of_another_model(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """transformers would draw the weights that it does not find at random, and say so in a table."""
    directory = write_clip(tmp_path / "clip")
    config = json.loads((directory / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (directory / "config.json").write_text(json.dumps(config))
    capfd.readouterr()
    refused(
        lambda: load(name, path=directory),
        rf"^rewards\.{name}\.path: {directory} is no CLIPModel of the published kind: 16 weights are missing .*"
        r"vision_model\.encoder\.layers\.2\.layer_norm1\.bias$",
    )
    assert capfd.readouterr() == ("", "")


def test_damaged_weights(tmp_path: Path) -> None:
    directory = write_clip(tmp_path / "clip")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    refused(lambda: load("pickscore", path=directory), r"^rewards\.pickscore\.path: .*/clip cannot be read: Safetensor")


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    directory = write_clip(tmp_path / "clip")
    (directory / "tokenizer.json").write_text("{")
    refused(lambda: load("clipscore", path=directory), r"^rewards\.clipscore\.path: .*/clip has no tokenizer that can")
