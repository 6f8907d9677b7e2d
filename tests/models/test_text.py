"""Text encoders: each prompt once, the same bits from wherever they come, and on the device only while they encode."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dgpo_fast import Trainer
from dgpo_fast.checkpoint import last_checkpoint, load_checkpoint
from dgpo_fast.config import Config, load_recipe
from dgpo_fast.evaluate import evaluate_view
from dgpo_fast.models import text as text_module
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.models.prompt_cache import PromptCache
from dgpo_fast.models.random_weights import pipeline_of_shape
from dgpo_fast.models.sd3 import load_model
from dgpo_fast.models.sources import EMBEDDED, TOKENIZERS
from dgpo_fast.models.text import TextEncoders
from dgpo_fast.records import Conditioning

from .test_random_weights import SHAPE, VAE

TINY = load_recipe("tiny-dgpo")
PROMPTS = ["two red circles", "", "a blue square left of a green triangle", "three green squares"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that knows no prompt."""
    monkeypatch.setenv("DGPO_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Counted:
    """Encoders of a copy of the embedded pipeline: how often they were loaded, and what they encoded, in order."""

    def __init__(self, pipeline: StableDiffusion3Pipeline) -> None:
        self.pipeline = StableDiffusion3Pipeline(**pipeline.components)
        self.loaded, self.encoded = 0, list[str]()
        encode_prompt = self.pipeline.encode_prompt

        def counting(*, prompt: list[str], **options: Any) -> object:
            self.encoded += prompt
            return encode_prompt(prompt=prompt, **options)

        self.pipeline.encode_prompt = counting

    def load(self) -> StableDiffusion3Pipeline:
        self.loaded += 1
        return self.pipeline

    def text(self, cache: PromptCache | None = None, *, device: str = "cpu") -> TextEncoders:
        return TextEncoders(self.load, dtype=torch.float32, text_length=12, device=torch.device(device), cache=cache)


@pytest.fixture
def counted(embedded_pipeline: StableDiffusion3Pipeline) -> Counted:
    return Counted(embedded_pipeline)


def test_a_prompt_that_is_not_read_to_its_end_is_said_once(counted: Counted) -> None:
    text, long = counted.text(), "three green squares " * 9
    with pytest.warns(UserWarning, match=r"28 tokens, of which 12 are read \(model\.text_length\)") as warned:
        text.encode([PROMPTS[0], long.strip(), long + "and more"])
    assert len(warned) == 1


def assert_same(found: Conditioning, expected: Conditioning) -> None:
    assert torch.equal(found.text_BND, expected.text_BND)
    assert torch.equal(found.pooled_BD, expected.pooled_BD)


def rows(conditioning: Conditioning, prompts: list[str]) -> Conditioning:
    """The rows of `prompts` where `conditioning` is of PROMPTS."""
    return conditioning[torch.tensor([PROMPTS.index(prompt) for prompt in prompts])]


# The same bits


def test_a_product_replaced_for_sharded_layers_does_not_reach_the_text(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's stage 3 replaces torch's in the process; embeddings, which are kept on disk, must not tell."""
    expected = counted.text().encode(PROMPTS)

    def replaced(*arguments: object) -> Tensor:
        raise AssertionError("this product is for the transformer")

    monkeypatch.setattr(torch.nn.functional, "linear", replaced)
    assert_same(counted.text().encode(PROMPTS), expected)
    assert torch.nn.functional.linear is replaced


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cold_warm_and_from_disk_are_the_same_bits_in_every_order(dtype: str) -> None:
    config = load_recipe("tiny-dgpo", [f"model.dtype={dtype}"]).model
    without = config.model_copy(update={"prompt_cache": False})
    expected = load_model(without, device="cpu").encode(PROMPTS)
    assert {expected.text_BND.dtype, expected.pooled_BD.dtype} == {getattr(torch, dtype)}
    cold = load_model(config, device="cpu")
    for order in itertools.permutations(PROMPTS):
        cold.text._known.clear()
        assert_same(cold.encode(order), rows(expected, [*order]))  # the first computes, the rest reads
        assert_same(cold.encode(order[:2]), rows(expected, [*order[:2]]))  # from memory
    from_disk = load_model(config, device="cpu")
    for prompt in reversed(PROMPTS):
        assert_same(from_disk.encode([prompt]), rows(expected, [prompt]))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_prompt_does_not_depend_on_those_beside_it(order: tuple[int, ...], counted: Counted) -> None:
    """Computed each time, in batches of one, two and three."""
    alone = [counted.text().encode([prompt]) for prompt in PROMPTS[:3]]
    prompts = [PROMPTS[number] for number in order]
    for first in (prompts[:1], prompts[:2], prompts):
        text = counted.text()
        both = text.encode(first), text.encode(prompts, soon=PROMPTS)
        for number, prompt in enumerate(prompts):
            place = torch.tensor([number])
            assert_same(both[1][place], alone[PROMPTS.index(prompt)])
            if prompt in first:
                assert_same(both[0][place], alone[PROMPTS.index(prompt)])


def test_a_batch_would_round_otherwise(embedded_pipeline: StableDiffusion3Pipeline, counted: Counted) -> None:
    """Why prompts are encoded one at a time; where this fails, kernels no longer depend on the number of prompts."""
    options = {"do_classifier_free_guidance": False, "max_sequence_length": 12}
    _, _, together, _ = embedded_pipeline.encode_prompt(PROMPTS, None, None, **options)
    one_by_one = counted.text().encode(PROMPTS).pooled_BD
    assert (together - one_by_one).abs().max() < 1e-5
    if torch.equal(together, one_by_one):
        pytest.skip("on this processor a batch rounds as its prompts alone do")


# Once


def test_each_prompt_is_encoded_once_a_run(counted: Counted) -> None:
    text = counted.text()
    for prompts in ([PROMPTS[0], PROMPTS[0], PROMPTS[1]], [PROMPTS[1], PROMPTS[2]], PROMPTS[:3]):
        text.encode(prompts)
    assert (counted.loaded, counted.encoded) == (1, PROMPTS[:3])


def test_rows_are_as_asked_for(counted: Counted) -> None:
    text = counted.text()
    asked = [PROMPTS[2], PROMPTS[0], PROMPTS[2], PROMPTS[2]]
    found = text.encode(asked)
    assert len(found.text_BND) == len(found.pooled_BD) == 4
    for row, prompt in enumerate(asked):
        assert_same(found[torch.tensor([row])], text.encode([prompt]))


def test_each_prompt_is_encoded_once_a_machine(counted: Counted, own_cache: Path) -> None:
    counted.text(PromptCache(own_cache, {})).encode(PROMPTS[:2])
    counted.text(PromptCache(own_cache, {})).encode(PROMPTS[:3])
    assert counted.encoded == PROMPTS[:3]
    counted.text(PromptCache(own_cache, {})).encode(PROMPTS[:3])
    assert (counted.loaded, counted.encoded) == (2, PROMPTS[:3]), "nothing was missing: nothing was loaded"


def test_a_damaged_embedding_is_encoded_again_and_replaced(counted: Counted, own_cache: Path) -> None:
    cache = PromptCache(own_cache, {})
    expected = counted.text(cache).encode([""])
    cache.path("").write_bytes(cache.path("").read_bytes()[:-1])
    assert_same(counted.text(cache).encode([""]), expected)
    assert counted.encoded == ["", ""]
    assert_same(counted.text(cache).encode([""]), expected)
    assert counted.encoded == ["", ""], "the file is whole again"


def test_without_a_disk_it_goes_on(counted: Counted, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    text = counted.text(PromptCache(tmp_path / "file", {}))
    assert_same(text.encode(PROMPTS), counted.text().encode(PROMPTS))
    text.encode(PROMPTS)
    assert counted.encoded == 2 * PROMPTS
    assert capsys.readouterr().err.count("\n") == 1


def test_what_was_used_longest_ago_is_forgotten_first(counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    size = counted.text().encode([""])
    two_rows = 2 * (size.text_BND.nbytes + size.pooled_BD.nbytes)
    monkeypatch.setattr(text_module, "REMEMBERED_BYTES", two_rows)
    text, before = counted.text(), len(counted.encoded)
    for prompts in (["a", "b"], ["a"], ["c"], ["a"], ["b"]):
        text.encode(prompts)
    assert counted.encoded[before:] == ["a", "b", "c", "b"]
    assert len(text.encode(["a", "b", "c", "d"]).text_BND) == 4, "a call may ask for more than is remembered"


def test_later_prompts_are_encoded_while_the_encoders_are_there(
    counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_module, "ENCODED_AT_ONCE", 3)
    text = counted.text()
    text.encode(["a"])
    drawn = iter(["c", "a", "d", "e"])
    text.encode(["a"], soon=drawn)
    assert counted.encoded == ["a"], "nothing was unknown"
    text.encode(["b", "a"], soon=drawn)
    assert counted.encoded == ["a", "b", "c", "d"], "the first three of those to come"
    assert [*drawn] == ["e"]
    text.encode(["c", "d"])
    assert counted.encoded == ["a", "b", "c", "d"]


def test_later_prompts_that_lie_on_the_disk_are_left_there(counted: Counted, own_cache: Path) -> None:
    counted.text(PromptCache(own_cache, {})).encode(["later"])
    counted.text(PromptCache(own_cache, {})).encode(["now"], soon=["later"])
    assert counted.encoded == ["later", "now"]


# What is loaded


def loading(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """The parts that each call of from_pretrained loaded."""
    loads: list[set[str]] = []
    from_pretrained = StableDiffusion3Pipeline.from_pretrained

    def counting(*arguments: Any, **options: Any) -> StableDiffusion3Pipeline:
        pipeline = from_pretrained(*arguments, **options)
        loads.append({name for name, part in pipeline.components.items() if part is not None} - options.keys())
        return pipeline

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", counting)
    return loads


def test_encoders_are_loaded_where_a_prompt_is_unknown_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = loading(monkeypatch)
    model = load_model(TINY.model, device="cpu")
    assert loads == [{"transformer", "vae", "scheduler"}]
    model.encode(PROMPTS)
    model.encode(["another"])
    assert loads[1:] == [{"scheduler", *text_module.ENCODERS, *TOKENIZERS}]
    assert model.text._pipeline.transformer is model.transformer
    again = load_model(TINY.model, device="cpu")
    again.encode([*PROMPTS, "another"])
    assert loads[2:] == [{"transformer", "vae", "scheduler"}]


def test_adapters_still_learn_after_the_encoders_came(tmp_path: Path) -> None:
    """The encoders' pipeline shares the transformer, which carries the adapters by then."""
    model = load_model(TINY.model, device="cpu")
    policy = AdapterPolicy(model, TINY.adapter, seed=0)
    learning = {name for name, weight in model.transformer.named_parameters() if weight.requires_grad}
    model.encode(PROMPTS)
    assert {name for name, weight in model.transformer.named_parameters() if weight.requires_grad} == learning
    assert len(learning) > 0
    policy.check_trained()


def test_the_recipe_may_keep_the_disk_out_of_it(own_cache: Path) -> None:
    config = load_recipe("tiny-dgpo", ["model.prompt_cache=false"]).model
    load_model(config, device="cpu").encode(PROMPTS)
    assert not own_cache.exists()
    load_model(TINY.model, device="cpu").encode(PROMPTS)
    assert len([*own_cache.rglob("*.safetensors")]) == len(PROMPTS)


@pytest.mark.parametrize("change", ["model.dtype=bfloat16", "model.text_length=16"])
def test_another_precision_or_length_is_another_embedding(change: str, own_cache: Path) -> None:
    for config in (TINY, load_recipe("tiny-dgpo", [change])):
        model = load_model(config.model, device="cpu")
        assert_same(model.encode([""]), load_model(config.model, device="cpu").encode([""]))
        clip_tokens = model.text._pipeline.tokenizer_max_length
        assert model.encode([""]).text_BND.shape[1] == clip_tokens + config.model.text_length
    assert len([*own_cache.rglob("*.safetensors")]) == 2


def test_a_pipeline_without_t5_encodes(counted: Counted) -> None:
    """What T5 would say is zero there, as wide as the transformer takes it."""
    with_t5 = counted.text().encode(PROMPTS)
    counted.pipeline.register_modules(text_encoder_3=None, tokenizer_3=None)
    found = counted.text().encode(PROMPTS)
    assert found.text_BND.shape == with_t5.text_BND.shape
    assert not found.text_BND[:, -12:].any()
    assert torch.equal(found.text_BND[:, :-12], with_t5.text_BND[:, :-12])


HUB = """
import sys
from pathlib import Path
from dgpo_fast.config import load_recipe
from dgpo_fast.models.sd3 import load_model
from dgpo_fast.models.sources import find_model, text_identity
refs = Path(sys.argv[1])
config = load_recipe("tiny-dgpo", ["model.name=some/model"]).model
model = load_model(config, device="cpu")
refs.write_text(40 * "2")  # pushed meanwhile; its text encoders are missing
print(model.encode(["a red circle"]).pooled_BD.shape, text_identity(find_model("some/model", revision=sys.argv[2])))
"""
COMMIT, PUSHED = 40 * "1", 40 * "2"


def test_a_hub_models_encoders_are_of_the_commit_that_was_loaded(
    tmp_path: Path, child_environment: dict[str, str]
) -> None:
    repository = tmp_path / "hub" / "models--some--model"
    shutil.copytree(EMBEDDED, repository / "snapshots" / COMMIT)
    (repository / "snapshots" / PUSHED).mkdir()
    shutil.copy(EMBEDDED / "model_index.json", repository / "snapshots" / PUSHED)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    run = subprocess.run(
        [sys.executable, "-c", HUB, str(repository / "refs" / "main"), COMMIT],
        env={**child_environment, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.stdout.strip() == f"torch.Size([1, 80]) {{'hub': 'some/model', 'commit': '{COMMIT}'}}", run.stderr


# On the device only while encoding


class PretendedDevice(TorchFunctionMode):
    """On a machine without another device: `.to("cuda")` copies within the CPU, so that what moved can be told."""

    def __torch_function__(
        self, function: Callable[..., Any], types: object, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        options, pretended = dict(options or {}), torch.device("cuda")
        if function is Tensor.to and pretended in (*arguments[1:], options.get("device")):
            return arguments[0].to(options.get("dtype")).clone()
        return function(*arguments, **options)


def places(pipeline: StableDiffusion3Pipeline) -> Iterator[int]:
    for name in text_module.ENCODERS:
        module = getattr(pipeline, name)
        yield from (tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers()))


@pytest.mark.parametrize("failure", [None, RuntimeError("out of memory")])
def test_encoders_are_on_the_device_only_while_they_encode(
    failure: Exception | None, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, meanwhile = [*places(counted.pipeline)], []
    expected = counted.text().encode(PROMPTS)
    encode_prompt = counted.pipeline.encode_prompt

    def looking(**options: Any) -> object:
        meanwhile.append([*places(counted.pipeline)])
        if failure is not None:
            raise failure
        return encode_prompt(**options)

    monkeypatch.setattr(counted.pipeline, "encode_prompt", looking)
    text = TextEncoders(
        lambda: counted.pipeline, dtype=torch.float32, text_length=12, device=torch.device("cuda"), cache=None
    )
    with PretendedDevice():
        if failure is not None:
            with pytest.raises(RuntimeError, match="out of memory"):
                text.encode(PROMPTS)
        else:
            assert_same(text.encode(PROMPTS), expected)
            text.encode(PROMPTS)
    assert len(meanwhile) == (1 if failure else len(PROMPTS))
    assert all(place == meanwhile[0] for place in meanwhile), "one journey for all"
    assert not set(meanwhile[0]) & set(home), "every weight and buffer of all three came along"
    assert [*places(counted.pipeline)] == home


@pytest.mark.gpu
def test_encoders_leave_a_gpu() -> None:
    model = load_model(TINY.model, device="cuda")
    model.encode(["what the libraries keep for their first products"])
    before = torch.cuda.memory_allocated()
    found = model.encode(PROMPTS)
    assert found.text_BND.is_cuda
    assert {weight.device.type for weight in model.text._pipeline.text_encoder_3.parameters()} == {"cpu"}
    assert torch.cuda.memory_allocated() - before <= found.text_BND.nbytes + found.pooled_BD.nbytes + 2**12
    assert_same(load_model(TINY.model, device="cuda").encode(PROMPTS), found)


def test_a_random_models_prompts_are_kept_too(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    config = load_recipe("tiny-dgpo", ["model.name=random:sd35-medium", "model.resolution=64"]).model

    def small(name: str, **options: Any) -> StableDiffusion3Pipeline:
        return pipeline_of_shape(SHAPE, VAE, **options)

    monkeypatch.setattr("dgpo_fast.models.sd3.random_pipeline", small)
    first, second = (load_model(config, device="cpu") for _ in range(2))
    found = first.encode(["two red circles"])
    assert found.text_BND.shape == (1, 77 + 12, SHAPE.joint_attention_dim)
    assert len([*own_cache.rglob("*.safetensors")]) == 1
    assert_same(second.encode(["two red circles"]), found)


# In a run


def test_encoders_come_once_for_the_iterations_of_a_run(
    quick: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journeys: list[list[str]] = []
    encode = TextEncoders._encode
    monkeypatch.setattr(
        TextEncoders, "_encode", lambda text, prompts: journeys.append([*prompts]) or encode(text, prompts)
    )
    trainer = Trainer(load_recipe("tiny-dgpo", [*quick, "steps=3"]), tmp_path)
    for _ in range(3):
        trainer.run_iteration()
    drawn = [prompt for iteration in range(3) for prompt in trainer.prompts.draw(iteration)]
    assert journeys == [[""], [*dict.fromkeys(drawn)]]
    evaluate_view(trainer.policy, "ref", trainer.test_prompts, trainer.config, trainer.scorer, trainer.world)
    assert journeys[2:] == [trainer.test_prompts]


def test_a_run_is_the_same_whether_its_embeddings_were_there(quick: tuple[str, ...], tmp_path: Path) -> None:
    def weights(name: str, *overrides: str) -> dict[str, Tensor]:
        config: Config = load_recipe("tiny-dgpo", [*quick, "steps=2", "evaluation.every=0", *overrides])
        Trainer(config, tmp_path / name).train()
        return load_checkpoint(last_checkpoint(tmp_path / name)).tensors("policy")

    cold, warm, without = weights("cold"), weights("warm"), weights("without", "model.prompt_cache=false")
    for name, tensor in cold.items():
        assert torch.equal(warm[name], tensor)
        assert torch.equal(without[name], tensor)
