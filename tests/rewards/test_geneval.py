"""The reward `geneval` on small models of the published classes, saved to disk with random weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from dgpo_fast.errors import UserError
from dgpo_fast.models.tiny.tokenizers import train_clip_tokenizer
from dgpo_fast.prompts.geneval import CLASSES, COLORS
from dgpo_fast.records import Prompt
from dgpo_fast.reward_config import GenEvalConfig, RewardConfig, RewardsConfig
from dgpo_fast.rewards import geneval_detector, load_reward
from dgpo_fast.rewards.base import absent_weights, has_weights
from dgpo_fast.rewards.geneval import GenEvalReward
from dgpo_fast.rewards.geneval_colors import ColorReader, Crop, prepare
from dgpo_fast.rewards.geneval_detector import Detections, Detector, boxes_of
from dgpo_fast.rewards.preprocessing import levels_of

CPU = torch.device("cpu")


def tiny_detector(num_labels: int = 80, num_queries: int = 100) -> Mask2FormerForUniversalSegmentation:
    """Random weights, of which those that score classes and masks are scaled up, so that some objects are found."""
    backbone = SwinConfig(
        embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, num_labels=num_labels, num_queries=num_queries, feature_size=32,
        mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, dim_feedforward=32, encoder_layers=1,
        decoder_layers=3, num_attention_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        model.class_predictor.weight.normal_(std=1.5)
        for parameter in model.model.transformer_module.queries_features.parameters():
            parameter.normal_()
        for parameter in model.model.transformer_module.queries_embedder.parameters():
            parameter.normal_()
    return model


@pytest.fixture(scope="session")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Both models as their libraries save them."""
    root = tmp_path_factory.mktemp("geneval")
    tiny_detector().save_pretrained(root / "detector")
    texts = [f"a photo of a {color}-colored {name} object" for color in COLORS for name in CLASSES]
    tokenizer = train_clip_tokenizer(texts, pad_token="<|endoftext|>")
    tokenizer.model_max_length = 77
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14,
        projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(1)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    CLIPModel(config).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    return root / "detector", root / "clip"


def rewards_config(settings: GenEvalConfig) -> RewardsConfig:
    return RewardsConfig(terms=(RewardConfig(name="geneval"),), geneval=settings)


@pytest.fixture(scope="session")
def reward(directories: tuple[Path, Path]) -> Any:
    detector, clip = directories
    made = load_reward("geneval", rewards_config(GenEvalConfig(path=str(detector), clip_path=str(clip))))
    # 800 pixels are for the published weights; these see as much in 128, in a fortieth of the time.
    made._detector = Detector(made._detector._model, short_side=128)
    return made


def pictures(num: int, height: int, width: int, *, seed: int = 0) -> Tensor:
    """Noise of several sizes, and so with edges."""
    generator = torch.Generator().manual_seed(seed)
    noise = [
        torch.nn.functional.interpolate(torch.rand(num, 3, side, side, generator=generator), (height, width))
        for side in (2, 5, 16)
    ]
    return torch.stack(noise).mean(0)


# Detection


def saved_detector(directories: tuple[Path, Path], *, short_side: int) -> Detector:
    return Detector(Detector.from_directory(directories[0], device=CPU)._model, short_side=short_side)


def test_objects_are_those_of_transformers(directories: tuple[Path, Path]) -> None:
    """Its own post-processing, image by image: classes, scores to its six decimals, masks to the pixel.

    It measures masks at 384 x 384 pixels, so images and input are of that size here; and it has the query's 100 best.
    """
    detector = saved_detector(directories, short_side=384)
    images = pictures(2, 384, 384)
    pixels, size = detector.prepare(images)
    assert size == (384, 384)
    with torch.no_grad():
        output = detector._model(pixel_values=pixels)
    confidence = [0.3, 0.05]
    counts = []
    for image, (found, threshold) in enumerate(zip(detector(images, confidence=confidence), confidence, strict=True)):
        (expected,) = Mask2FormerImageProcessor().post_process_instance_segmentation(
            type(output)(
                class_queries_logits=output.class_queries_logits[image : image + 1],
                masks_queries_logits=output.masks_queries_logits[image : image + 1],
            ),
            threshold=threshold,
            target_sizes=[(384, 384)],
            return_binary_maps=True,
        )
        assert_same_objects(found, expected)
        counts.append(len(found.label_K))
    assert min(counts) > 0 and len(set(counts)) > 1, "or there is nothing to compare"


def assert_same_objects(found: Detections, expected: dict[str, Any]) -> None:
    order = found.score_K.argsort(descending=True).tolist()
    theirs = sorted(expected["segments_info"], key=lambda segment: -segment["score"])
    assert [segment["label_id"] for segment in theirs] == found.label_K[order].tolist()
    scores = [segment["score"] for segment in theirs]
    torch.testing.assert_close(found.score_K[order], torch.tensor(scores), rtol=0, atol=1e-6)
    masks = expected["segmentation"][[segment["id"] for segment in theirs]].bool()
    assert torch.equal(found.mask_KHW[order], masks)


def test_an_image_is_seen_alike_in_any_batch(directories: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """More images than one forward takes, each with its own threshold."""
    detector = saved_detector(directories, short_side=96)
    images, confidence = pictures(5, 64, 64), [0.1, 0.9, 0.05, 0.3, 0.1]
    monkeypatch.setattr(geneval_detector, "IMAGES_PER_FORWARD", 2)
    monkeypatch.setattr(geneval_detector, "MASKS_AT_ONCE", 3)
    together = detector(images, confidence=confidence)
    alone = [detector(images[place : place + 1], confidence=confidence[place : place + 1])[0] for place in range(5)]
    assert sum(len(each.label_K) for each in together) > 10
    for one, other in zip(together, alone, strict=True):
        assert one.label_K.tolist() == other.label_K.tolist()
        torch.testing.assert_close(one.score_K, other.score_K, rtol=1e-4, atol=1e-5)
        assert (one.mask_KHW == other.mask_KHW).float().mean() > 0.999 if len(one.label_K) else True
    assert all((each.score_K > least).all() for each, least in zip(together, confidence, strict=True))


@pytest.mark.parametrize(
    ("size", "resized", "padded"),
    [
        ((512, 512), (800, 800), (800, 800)),
        ((1024, 1024), (800, 800), (800, 800)),
        ((60, 64), (800, 853), (800, 864)),
        ((30, 60), (667, 1333), (672, 1344)),  # the longer side decides
    ],
)
def test_images_are_enlarged_as_mmdetection_does(
    size: tuple[int, int], resized: tuple[int, int], padded: tuple[int, int]
) -> None:
    detector = Detector(tiny_detector())
    pixels, found = detector.prepare(pictures(1, *size))
    assert found == resized
    assert pixels.shape == (1, 3, *padded)
    assert (pixels[..., resized[0] :, :] == 0).all()
    assert (pixels[..., resized[1] :] == 0).all()


def test_enlarged_pixels_are_pillows() -> None:
    """Bilinear, in 8 bits, normalised: as transformers' processor does at the same size, to one level of 255."""
    images = pictures(1, 60, 60)
    (given,) = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    processor = Mask2FormerImageProcessor(
        size={"shortest_edge": 800, "longest_edge": 1333}, size_divisor=32, image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    expected = processor(Image.fromarray(given), return_tensors="pt")["pixel_values"]
    pixels, _ = Detector(tiny_detector()).prepare(images)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1.01 / 255 / 0.224)
    # As the benchmark reads red first: a red image is brighter in the first channel.
    red = torch.zeros(1, 3, 32, 32)
    red[:, 0] = 1
    pixels, _ = Detector(tiny_detector()).prepare(red)
    torch.testing.assert_close(pixels[0, :, 5, 5], torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]))


def test_boxes_end_behind_the_last_pixel() -> None:
    masks = torch.zeros(3, 6, 9, dtype=torch.bool)
    masks[0, 2, 3] = True
    masks[1] = True
    masks[2, 1, 0] = masks[2, 4, 7] = True
    assert boxes_of(masks).tolist() == [[3, 2, 4, 3], [0, 0, 9, 6], [0, 1, 8, 5]]
    assert boxes_of(masks[:0]).shape == (0, 4)


# Colours


def crop_of(image_CHW: Tensor, box: tuple[int, int, int, int], *, seed: int = 0) -> Crop:
    mask = torch.rand(image_CHW.shape[1:], generator=torch.Generator().manual_seed(seed)) > 0.3
    return Crop("dog", levels_of(image_CHW[None])[0], mask, box)


def with_pillow(crop: Crop, *, size: int) -> Tensor:
    """The benchmark's way: an image, a grey one, a mask, a crop; open_clip's resizing, centre and normalisation."""
    image = Image.fromarray(crop.levels_CHW.permute(1, 2, 0).to(torch.uint8).numpy())
    mask = Image.fromarray(crop.mask_HW.numpy())
    cut = Image.composite(image, Image.new("RGB", image.size, "#999"), mask).crop(crop.box)
    width, height = cut.size
    short = min(width, height)
    resized = cut.resize((int(size * width / short), int(size * height / short)), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in resized.size)
    centre = resized.crop((left, top, left + size, top + size))
    processor = CLIPImageProcessor(do_resize=False, do_center_crop=False)
    return processor(centre, return_tensors="pt")["pixel_values"][0]


@pytest.mark.parametrize(
    "box",
    [(0, 0, 64, 48), (10, 5, 40, 35), (3, 4, 61, 9), (20, 0, 22, 48), (7, 7, 8, 8), (0, 0, 63, 1)],
    ids=["whole", "square", "wide", "tall", "pixel", "line"],
)
@pytest.mark.parametrize("size", [56, 224, 16])
def test_crops_are_those_of_pillow(box: tuple[int, int, int, int], size: int) -> None:
    """To the bit before they are normalised, in which three float32 roundings of numbers up to 3 differ."""
    crop = crop_of(pictures(1, 48, 64)[0], box)
    found, expected = prepare(crop, size=size), with_pillow(crop, size=size)
    torch.testing.assert_close(found, expected, rtol=0, atol=3 * 4 * 2**-24)


def test_an_elongated_crop_is_not_enlarged_beyond_what_is_seen() -> None:
    """A line of 4000 pixels would be 900,000 pixels wide."""
    crop = Crop("dog", torch.zeros(3, 2, 4000), torch.ones(2, 4000, dtype=torch.bool), (0, 0, 4000, 1))
    assert prepare(crop, size=224).shape == (3, 224, 224)


@pytest.fixture(scope="session")
def reader(directories: tuple[Path, Path]) -> ColorReader:
    return ColorReader.from_directory(directories[1], device=CPU)


def test_colors_are_those_that_clip_finds_nearest(directories: tuple[Path, Path], reader: ColorReader) -> None:
    """Written out for one crop and one colour at a time, with nothing padded or batched."""
    model = CLIPModel.from_pretrained(directories[1]).eval()
    tokenizer = CLIPTokenizer.from_pretrained(directories[1])

    def unit(features: Any) -> Tensor:
        return features.pooler_output[0] / features.pooler_output[0].norm()

    def color_of(crop: Crop) -> tuple[str, list[float]]:
        image = unit(model.get_image_features(pixel_values=with_pillow(crop, size=56)[None]))
        similarities = []
        for color in COLORS:
            sentences = (f"a photo of a {color} {crop.name}", f"a photo of a {color}-colored {crop.name}",
                         f"a photo of a {color} object")  # fmt: skip
            texts = [unit(model.get_text_features(**tokenizer(text, return_tensors="pt"))) for text in sentences]
            mean = torch.stack(texts).mean(0)
            similarities.append(float(image @ (mean / mean.norm())))
        return COLORS[similarities.index(max(similarities))], similarities

    images = torch.cat([pictures(8, 48, 64), torch.rand(4, 3, 1, 1).expand(4, 3, 48, 64)])
    crops = [crop_of(image, (4, 4, 40, 40), seed=place) for place, image in enumerate(images)]
    crops = [crop._replace(name=CLASSES[place]) for place, crop in enumerate(crops)]
    with torch.no_grad():
        expected = [color_of(crop) for crop in crops]
    for found, (color, similarities) in zip(reader(crops), expected, strict=True):
        best, second = sorted(similarities)[-1:-3:-1]
        assert found == color or best - second < 1e-5
    assert reader([]) == []


def test_a_class_is_read_once_and_colors_differ(reader: ColorReader) -> None:
    embedding = reader.embed_colors("zebra")
    assert reader.embed_colors("zebra") is embedding
    assert embedding.shape == (10, 16)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(10))
    assert torch.pdist(embedding).min() > 0
    assert not torch.equal(embedding, reader.embed_colors("dog"))


# The reward


PROMPTS = [
    Prompt("a photo of a dog", {"tag": "single_object", "include": [{"class": "dog", "count": 1}]}),
    Prompt("a photo of a red dog", {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}),
    Prompt(
        "a photo of two dogs",
        {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]},
    ),
]


class Scenes:
    """A detector of rectangles: an image's objects are listed beforehand."""

    def __init__(self, *scenes: list[tuple[str, float, tuple[int, int, int, int]]]) -> None:
        self.scenes, self.confidence = scenes, [0.0]

    def __call__(self, images_BCHW: Tensor, *, confidence: list[float]) -> list[Detections]:
        self.confidence = confidence
        return [*self._detections(images_BCHW)]

    def _detections(self, images_BCHW: Tensor) -> Iterator[Detections]:
        for scene in self.scenes:
            masks = torch.zeros(len(scene), *images_BCHW.shape[-2:], dtype=torch.bool)
            for mask, (_, _, (left, top, right, bottom)) in zip(masks, scene, strict=True):
                mask[top:bottom, left:right] = True
            yield Detections(
                label_K=torch.tensor([CLASSES.index(name) for name, _, _ in scene], dtype=torch.int64),
                score_K=torch.tensor([score for _, score, _ in scene]),
                box_K4=boxes_of(masks),
                mask_KHW=masks,
            )


def test_what_was_found_becomes_scores(reward: GenEvalReward, monkeypatch: pytest.MonkeyPatch) -> None:
    """The detector's scenes are made up; crops go through the real CLIP, whose answer is looked up beside it."""
    dog = ("dog", 0.95, (8, 8, 40, 40))
    more = [dog, ("dog", 0.91, (41, 41, 50, 50)), ("dog", 0.4, (0, 0, 3, 3))]
    scenes = Scenes([dog], [dog, ("cat", 0.99, (0, 0, 4, 4))], more)
    monkeypatch.setattr(reward, "_detector", scenes)
    images = pictures(3, 64, 64)
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[8:40, 8:40] = True
    (color,) = reward._reader([Crop("dog", levels_of(images)[1], mask, (8, 8, 40, 40))])
    other = next(each for each in COLORS if each != color)
    right, wrong = (
        Prompt("x", {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": each}]})
        for each in (color, other)
    )
    for prompt, worth in ((right, 1.0), (wrong, 0.5)):
        assert reward(images, [PROMPTS[0], prompt, PROMPTS[2]]) == {
            "soft": [1.0, worth, 1.0],
            "strict": [1.0, float(worth == 1), 1.0],
            "correct": [1.0, float(worth == 1), 1.0],
        }
    assert scenes.confidence == [0.3, 0.3, 0.9]


def test_the_first_metric_is_what_published_runs_train_on(reward: GenEvalReward) -> None:
    """From pixels to scores, with nothing replaced."""
    scores = reward(pictures(3, 64, 64), PROMPTS)
    assert list(scores) == ["soft", "strict", "correct"]
    assert all(len(values) == 3 and all(map(math.isfinite, values)) for values in scores.values())


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (
            "a photo of a dog",
            "the prompt 'a photo of a dog' does not say what to look for; expected prompts of geneval:tr",
        ),
        (Prompt("a photo of a dog"), "does not say what to look for"),
        (
            Prompt("a dgo", {"tag": "colors", "include": [{"class": "dgo", "count": 1}]}),
            "the metadata of the prompt 'a dgo': no class 'dgo'",
        ),
    ],
)
def test_a_prompt_that_cannot_be_judged(prompt: str, message: str, reward: GenEvalReward) -> None:
    with pytest.raises(UserError, match=f"^rewards: geneval: .*{message}") as error:
        reward(pictures(1, 32, 32), [prompt])
    assert "\n" not in str(error.value)


# Weights


def test_directories_that_lack_something(directories: tuple[Path, Path], tmp_path: Path) -> None:
    detector, clip = map(str, directories)
    for settings, message in (
        (
            GenEvalConfig(path=str(tmp_path), clip_path=clip),
            r"rewards\.geneval\.path: .* has no config\.json; expected",
        ),
        (GenEvalConfig(path=detector, clip_path=str(tmp_path)), r"rewards\.geneval\.clip_path: .* has no config\.json"),
    ):
        with pytest.raises(UserError, match=message):
            GenEvalReward(settings, device=CPU)
        with pytest.raises(UserError, match=message):
            absent_weights("geneval", rewards_config(settings))
    assert absent_weights("geneval", rewards_config(GenEvalConfig(path=detector, clip_path=clip))) == []


def test_a_model_of_other_classes(tmp_path: Path) -> None:
    tiny_detector(num_labels=133, num_queries=4).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"rewards\.geneval\.path: .* knows 133 classes; expected COCO's 80"):
        Detector.from_directory(tmp_path, device=CPU)


def test_files_that_cannot_be_read(directories: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((directories[1] / name).read_bytes()[:1000])
    with pytest.raises(UserError, match=r"rewards\.geneval\.clip_path: .* cannot be read: ") as error:
        ColorReader.from_directory(tmp_path, device=CPU)
    assert "\n" not in str(error.value)
    with pytest.raises(
        UserError, match=r"is no CLIPModel of the published kind: \d+ weights are missing or of another shape"
    ):
        (tmp_path / "config.json").write_bytes((directories[1] / "config.json").read_bytes())
        (tmp_path / "model.safetensors").write_bytes((directories[0] / "model.safetensors").read_bytes())
        ColorReader.from_directory(tmp_path, device=CPU)


def test_weights_that_are_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan says of them, and a run that cannot download them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert has_weights("geneval")
    detector, clip = (line for _, line in absent_weights("geneval", rewards_config(GenEvalConfig())))
    assert detector.startswith("the weights facebook/mask2former-swin-small-coco-instance (0.28 GB, ")
    assert clip.startswith("the weights openai/clip-vit-large-patch14 (1.71 GB, ")
    assert "hf download" in detector and "hf download" in clip
    with pytest.raises(
        UserError, match=r"rewards\.geneval\.path: the weights .* are not on this machine and cannot be"
    ):
        GenEvalReward(GenEvalConfig(), device=CPU)
