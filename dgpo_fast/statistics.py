"""What scores of images say, and how surely: means, paired changes and win rates, with 95 % intervals.

The unit is the prompt. Images of one prompt are alike, so that a hundred images of ten prompts say little more than
ten would; prompts are what could have been others. A mean is over images, its standard error over prompts: the
residuals of a prompt's images are summed before they are squared (cluster-robust, as Miller, arXiv 2411.00640, has it
for evaluations of language models). Two models that draw the same prompts from the same noise are compared by the
differences of their pairs (ibid.), in which what a prompt's difficulty does to both cancels.

Departure: Student's t with as many degrees of freedom as prompts less one, and prompts / (prompts - 1) in the variance,
where Miller has the normal limit, which is too narrow for few prompts (Cameron and Miller, Journal of Human Resources
50(2), 2015, on few clusters). With equally many images of every prompt this is the textbook's interval of the prompts'
means. Unlike a bootstrap it has a closed form, and no seed that could be chosen.

Shapes: P prompts, I images of each. What is not finite is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import nan, sqrt

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

LEVEL = 0.95
"""Share of evaluations on other prompts whose interval would hold the mean over all prompts of their kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number and the ends of its interval; NaN where there is none."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What a metric says of two models, of the images that have a score from both."""

    base: Estimate
    tuned: Estimate
    change: Estimate
    """Mean of tuned - base over pairs of images."""
    p: float
    """Of a change at least as large, either way, if there were none: the paired t-test over prompts."""
    win_rate: Estimate
    """Share of the prompts whose mean is higher when tuned; equal ones count half."""
    num_prompts: int
    """That have a pair."""
    num_pairs: int
    num_failed: int
    """Pairs that are left out, because one or both have no score."""


def compare(base_PI: Floats, tuned_PI: Floats) -> Comparison:
    """The paired comparison of two models: scores float64 [P, I], in which one place is one prompt and one noise."""
    change_PI = tuned_PI - base_PI
    paired = np.isfinite(change_PI)
    change, p = _mean_and_p(change_PI)
    return Comparison(
        base=clustered_mean(np.where(paired, base_PI, nan)),
        tuned=clustered_mean(np.where(paired, tuned_PI, nan)),
        change=change,
        p=p,
        win_rate=win_rate(prompt_means(change_PI)),
        num_prompts=int(paired.any(1).sum()),
        num_pairs=int(paired.sum()),
        num_failed=int((~paired).sum()),
    )


def clustered_mean(values_PI: Floats) -> Estimate:
    """The mean of all values, and its interval with prompts as clusters; without ends where fewer than two have one."""
    return _mean_and_p(values_PI)[0]


def prompt_means(values_PI: Floats) -> Floats:
    """The mean of each prompt, [P]; NaN where it has no value."""
    present = np.isfinite(values_PI)
    count_P = present.sum(1)
    return np.where(count_P > 0, np.where(present, values_PI, 0.0).sum(1) / np.maximum(count_P, 1), nan)


def win_rate(change_P: Floats) -> Estimate:
    """The share of changes above zero, zeros counted half, with Wilson's score interval.

    It has a width also where all changes have one sign, as the interval of a mean has not, and stays within [0, 1].
    Halves vary less than wins and losses: with ties it is wider than it need be. Source: Wilson, JASA 22, 1927;
    recommended by Brown, Cai and DasGupta, Statistical Science 16(2), 2001.
    """
    from scipy.special import ndtri

    change_P = change_P[np.isfinite(change_P)]
    count = len(change_P)
    if count == 0:
        return Estimate(mean=nan, low=nan, high=nan)
    rate = float((np.sign(change_P) + 1).mean() / 2)
    z2 = float(ndtri((1 + LEVEL) / 2)) ** 2
    centre = (rate + z2 / (2 * count)) / (1 + z2 / count)
    half = sqrt(z2 * (rate * (1 - rate) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return Estimate(mean=rate, low=max(0.0, centre - half), high=min(1.0, centre + half))


def _mean_and_p(values_PI: Floats) -> tuple[Estimate, float]:
    """The mean with its interval, and the p-value of a true mean of zero; NaN where fewer than two prompts have any."""
    # Not scipy.stats, which takes a second to import.
    from scipy.special import stdtr, stdtrit

    present = np.isfinite(values_PI)
    count_P, sum_P = present.sum(1), np.where(present, values_PI, 0.0).sum(1)
    num_prompts, num_values = int((count_P > 0).sum()), int(count_P.sum())
    if num_values == 0:
        return Estimate(mean=nan, low=nan, high=nan), nan
    # Of float32 scores this sum is exact in any order, unless they differ in size by more than 2^29 / their number: the
    # mean is then to the bit what an evaluation during training has.
    mean = float(sum_P.sum() / num_values)
    if num_prompts < 2:
        return Estimate(mean=mean, low=nan, high=nan), nan
    residual_P = sum_P - count_P * mean
    error = sqrt(num_prompts / (num_prompts - 1) * float(np.square(residual_P).sum())) / num_values
    half = float(stdtrit(num_prompts - 1, (1 + LEVEL) / 2)) * error
    estimate = Estimate(mean=mean, low=mean - half, high=mean + half)
    if error == 0:
        return estimate, 1.0 if mean == 0 else 0.0
    return estimate, float(2 * stdtr(num_prompts - 1, -abs(mean) / error))
