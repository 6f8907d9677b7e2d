"""The section `guard`: when a run counts as degenerating, and what happens then."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from dgpo_fast.sections import Positive, Section

Share = Annotated[float, Field(gt=0, le=1)]


def _off(value: object) -> object:
    """The word, which YAML takes for false."""
    return "off" if value is False else value


class GuardConfig(Section):
    """What a run is watched for. A threshold of null is never reached."""

    action: Annotated[Literal["warn", "stop", "lower_lr", "off"], BeforeValidator(_off)] = "warn"
    """Where a finding begins: say so; save and exit with status 1, where steps are left; halve the learning rate, from
    the next iteration on; or do not look. What is found in evaluations lowers no learning rate: how often one is made
    decides no weight."""
    window: Annotated[int, Field(ge=2)] = 10
    """Optimizer steps that are looked at together. The first judgement comes behind the first window. One that is
    changed on resume leaves the run's first window what it was."""
    diversity: Share | None = 0.3
    """Share of what the diversity was at the beginning, below which groups have become all alike."""
    zero_std: Share | None = 0.9
    """Mean share of groups without spread from which on next to no group teaches."""
    clip: Share | None = 0.9
    """Mean share of clipped samples from which on next to none teaches."""
    saturation: Share | None = 0.9
    """Mean share of saturated group weights that is too much where the reward has not risen. A guided reference
    (`algorithm.kl_cfg`) makes more than half of them so from the first step."""
    growth: Annotated[float, Field(gt=1)] | None = 10.0
    """Times that the distance to the reference, or the adapters' norm, may grow from one window to the next. Both grow
    all along in any run: where weights go straight ahead, by 2.7 and 1.6 times from the second window to the third, and
    later by less. The first window is not judged, and none in which the learning rate still rises."""
    reward_drop: Positive | None = 0.5
    """Standard deviations of the images' rewards that the mean reward may fall below where it began, or was best."""
    noise: Positive = 6.0
    """Standard errors that a fall of the training or of the held-out reward must exceed as well. Of hundreds of windows
    the best is two or three above the mean, and the worst as far below, where nothing happens at all."""
