"""Where rewards come from: names that recipes use, and classes of users' own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from dgpo_fast.errors import UserError
from dgpo_fast.records import Prompt
from dgpo_fast.reward_config import RewardConfig, RewardsConfig
from dgpo_fast.rewards import Reward, base, known_rewards, load_reward, register_reward
from dgpo_fast.rewards.base import check_metric, check_reward
from dgpo_fast.rewards.shapes import ShapesReward


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch, quick: tuple[str, ...]) -> Iterator[None]:
    """Names registered by a test are gone after it; rewards/misbehaving.py can be imported."""
    monkeypatch.setattr(base, "_FACTORIES", {})
    yield


def test_a_registered_class_has_its_name() -> None:
    @register_reward("zero")
    class Zero:
        def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
            return [0.0] * len(prompts)

    assert isinstance(load_reward("zero"), Zero)
    assert isinstance(Zero(), Reward)
    assert known_rewards() == sorted([*base.BUILT_IN, "zero"])


def test_a_registered_name_comes_before_a_built_in_one() -> None:
    @register_reward("shapes")
    class Mine(ShapesReward):
        pass

    assert type(load_reward("shapes")) is Mine


def test_the_built_in_reward() -> None:
    assert type(load_reward("shapes")) is ShapesReward


def test_a_class_of_ones_own_is_named_by_its_module() -> None:
    assert type(load_reward("misbehaving:Brightness")).__name__ == "Brightness"


class Thresholded:
    """A class and, below, a function that take an argument."""

    made = 0

    def __init__(self, *, threshold: float) -> None:
        self.threshold, Thresholded.made = threshold, Thresholded.made + 1

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
        return [self.threshold] * len(prompts)


def thresholded(images_BCHW: Tensor, prompts: Sequence[str], *, threshold: float = 0.0) -> list[float]:
    return [threshold] * len(prompts)


def with_arguments(name: str, **arguments: object) -> RewardsConfig:
    return RewardsConfig(terms=(RewardConfig(name=name),), arguments={name: arguments})


@pytest.mark.parametrize("target", ["Thresholded", "thresholded"])
def test_a_reward_takes_what_the_recipe_says(target: str) -> None:
    name = f"{__name__}:{target}"
    reward = load_reward(name, with_arguments(name, threshold=0.7))
    assert reward(torch.rand(2, 3, 4, 4), ["a", "b"]) == [0.7, 0.7]
    with pytest.raises(UserError, match=rf"'{name}' cannot be made: TypeError: .*'thresold'"):
        check_reward(name, with_arguments(name, threshold=0.7, thresold=0.7))


def test_a_registered_reward_takes_what_the_recipe_says() -> None:
    register_reward("thresholded")(Thresholded)
    reward = load_reward("thresholded", with_arguments("thresholded", threshold=0.7))
    assert isinstance(reward, Thresholded) and reward.threshold == 0.7
    register_reward("made")(lambda: thresholded)
    check_reward("made", RewardsConfig(terms=(RewardConfig(name="made"),)))


def test_the_packages_own_have_sections() -> None:
    for ask in (load_reward, check_reward):
        with pytest.raises(UserError, match=r"rewards\.arguments: 'ocr' comes with the package.* rewards\.ocr"):
            ask("ocr", with_arguments("ocr", threads=2))


def test_what_is_checked_is_not_made() -> None:
    name, before = f"{__name__}:Thresholded", Thresholded.made
    check_reward(name, with_arguments(name, threshold=0.7))
    assert Thresholded.made == before
    with pytest.raises(UserError, match="no reward 'shape'; did you mean 'shapes'"):
        check_reward("shape", with_arguments("shape"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "shape",
            rf"no reward 'shape'; did you mean 'shapes'\? known: {', '.join(sorted(base.BUILT_IN))}; or your own",
        ),
        ("nowhere:Reward", "'nowhere:Reward' cannot be made: ModuleNotFoundError: No module named 'nowhere'"),
        ("misbehaving:Nothing", "cannot be made: AttributeError: .*'Nothing'"),
        ("misbehaving:Broken", r"cannot be made: FileNotFoundError: weights\.bin"),
        ("collections:OrderedDict", "'collections:OrderedDict' is not callable"),
    ],
)
def test_what_is_no_reward(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_reward(name)
    assert "\n" not in str(error.value)


def test_a_registered_class_that_cannot_be_made() -> None:
    @register_reward("broken")
    class Broken:
        def __init__(self) -> None:
            raise FileNotFoundError("weights.bin")

        def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> list[float]:
            raise AssertionError("never made")

    with pytest.raises(UserError, match=r"'broken' cannot be made: FileNotFoundError: weights\.bin"):
        load_reward("broken")


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (RewardConfig(name="shapes", metric="strict"), None),
        (RewardConfig(name="misbehaving:Brightness", metric="whatever"), None),
        (RewardConfig(name="shapes", metric="strct"), "'shapes' has no metric 'strct'; did you mean 'strict'"),
        (RewardConfig(name="pickscore", metric="soft"), "'pickscore' has no metric 'soft'; it has pickscore"),
    ],
)
def test_the_metrics_of_the_package_are_known_beforehand(term: RewardConfig, message: str | None) -> None:
    """Of rewards of one's own they are not."""
    if message is None:
        check_metric(term)
        return
    with pytest.raises(UserError, match=message):
        check_metric(term)


@pytest.mark.parametrize("name", ["shapes", "jpeg_compressibility", "ocr"])
def test_metrics_are_those_that_a_reward_returns(name: str) -> None:
    caption = Prompt("a red circle", {"text": "red"})
    output = load_reward(name)(torch.rand(1, 3, 72, 72), [caption])
    assert (tuple(output) if isinstance(output, Mapping) else ()) == base.BUILT_IN[name].metrics
