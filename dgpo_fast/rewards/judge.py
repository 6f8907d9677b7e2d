"""The rewards `judge`, `deqa`, `unifiedreward`: what a vision-language model behind a server says of an image."""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import multiprocessing
import os
import random
import re
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dgpo_fast.errors import UserError, suggest
from dgpo_fast.reward_config import JudgeConfig, is_url
from dgpo_fast.rewards.preprocessing import to_bytes

KEY_VARIABLE = "DGPO_FAST_JUDGE_KEY"
LONGEST_BACKOFF_S = 30.0
AWAY_S = 0.2
"""The least wait for a server that takes no connection any more: there is no limit to how often it is asked."""

_JITTER = random.SystemRandom()  # its draws are no part of the run


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A question about an image, and how its answer is read."""

    text: str
    scale: tuple[float, float]
    pattern: str | None = None
    levels: Mapping[str, float] | None = None
    """Words and their scores: the score is their mean, weighted with how likely each is to begin the answer."""


_NUMBER = r"(\d+(?:\.\d+)?)"

# The formats are those that the models were trained on, the wording is our own. Whoever wants the models' wording too
# gives it as a template of their own, with the same pattern and scale.
TEMPLATES = {
    # UnifiedReward and UnifiedReward-qwen (arXiv 2503.05236), pointwise: a list "element (type): 0 or 1", then
    # "Final Score:" from 1 to 5; the caption in brackets. CodeGoat24/UnifiedReward,
    # inference_llava/image_generation/point_score_image_generation.py.
    "unifiedreward": Template(
        text=(
            "Here are an image that was generated from a text caption, and the caption. Judge the image twofold:\n"
            "1. Alignment: are the objects that the caption names there, with their attributes and relations?\n"
            "2. Quality: is the image sharp, detailed, true in its colours and pleasing?\n"
            "First list the key elements of the caption, one on each line, as 'element (type): value', where value is "
            "1 if the image shows it and 0 if it does not. Then write 'Final Score:' and a score from 1 to 5.\n"
            "Text Caption: [{prompt}]"
        ),
        pattern=rf"Final Score:\W*{_NUMBER}",
        scale=(1, 5),
    ),
    # UnifiedReward 2.0: three scores from 1 to 5, whose mean is taken. CodeGoat24/UnifiedReward,
    # inference_qwen/UnifiedReward-2.0-inference/point_score_ACS_image_generation.py.
    "unifiedreward-2": Template(
        text=(
            "Here are an image that was generated from a text caption, and the caption. Rate the image from 1 to 5 on "
            "three axes:\n"
            "- Alignment Score: does its content match the caption?\n"
            "- Coherence Score: is it consistent, without glitches and distorted objects?\n"
            "- Style Score: is it pleasing to look at, whatever the caption says?\n\n"
            "Answer in this format:\n\n"
            "Alignment Score (1-5): X\n"
            "Coherence Score (1-5): Y\n"
            "Style Score (1-5): Z\n\n"
            "Text Caption: [{prompt}]"
        ),
        pattern=r"\W+".join(rf"{axis} Score \(1-5\):\W*{_NUMBER}" for axis in ("Alignment", "Coherence", "Style")),
        scale=(1, 5),
    ),
    # DeQA-Score (arXiv 2501.11561), after Q-Align (arXiv 2312.17090): five levels from 5 to 1, and their mean under the
    # softmax of their logits. zhiyuanyou/DeQA-Score, src/evaluate/scorer.py, which begins the answer itself, "The
    # quality of the image is", and reads the next token; a chat has no such beginning: it is asked for one word.
    "deqa": Template(
        text="How good is the quality of this image? Answer with one word: excellent, good, fair, poor or bad.",
        levels={"excellent": 5, "good": 4, "fair": 3, "poor": 2, "bad": 1},
        scale=(1, 5),
    ),
}


class NoScoreError(Exception):
    """One image gets no score: no answer came, or none that can be read."""


class UnreachableError(NoScoreError):
    """The server takes no connection."""


class _RetryError(Exception):
    """What may go well the next time, and the error that it is if it does not."""

    def __init__(self, message: str, *, final: type[NoScoreError] = NoScoreError) -> None:
        super().__init__(message)
        self.final = final


class JudgeReward:
    """A metric of its section's name, in [0, 1], and `answer`, the same on the judge's own scale; NaN for no score.

    Each image is one request to `{url}/chat/completions`: a message of the user's with the image, as a PNG in a data
    URL, and the template's text with the prompt in place of {prompt}. No more than `concurrency` are under way at a
    time. A request is sent again, after a growing and random wait, where there is no connection or it breaks, or the
    server is silent for `timeout_s`, answers 408, 429 or 5xx, or what is not JSON: `retries` times, but one that has
    answered before and takes no connection now, as while it is started again, until `deadline_s` is over.

    An image has no score where all of that was in vain, the server refuses the request for its content (any status but
    these and 200), the answer cannot be read or is not on the scale, or there is none `deadline_s` after the batch was
    handed over. A warning says how many have none, and why the first has not.

    Args:
        device: ignored: the model runs where the server is.

    Raises:
        UserError: the settings name no server, model or template, or a pattern or scale that is none.
    """

    def __init__(self, settings: JudgeConfig, *, device: torch.device) -> None:
        self._settings = settings
        self._url = _checked_url(settings)
        if settings.model is None:
            raise UserError(f"{settings.key}.model: not set; expected what the server calls its model")
        self._template = _template(settings)
        self._has_answered = False
        self._headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            self._headers["Authorization"] = f"Bearer {key}"

    def __call__(self, images_BCHW: Tensor, prompts: Sequence[str]) -> Mapping[str, Sequence[float]]:
        """Both metrics.

        Args:
            images_BCHW: float in [0, 1], RGB.

        Raises:
            UserError: the server has never answered and takes no connection, refuses the key (401, 403), or does not
                know the address or the model (404).
        """
        pixels_BHWC = to_bytes(images_BCHW).numpy()
        num_threads = max(1, min(self._settings.concurrency, len(prompts)))
        end = time.monotonic() + self._settings.deadline_s
        with ThreadPool(num_threads) as pool:  # of daemons: a server that hangs must not keep the process alive
            asked = [pool.apply_async(self._outcome, (*one, end)) for one in zip(pixels_BHWC, prompts, strict=True)]
            outcomes = [self._await(each, end) for each in asked]
        self._report([outcome for outcome in outcomes if isinstance(outcome, NoScoreError)], len(outcomes))
        answers = [math.nan if isinstance(outcome, NoScoreError) else outcome for outcome in outcomes]
        worst, best = self._template.scale
        return {self._settings.section: [(answer - worst) / (best - worst) for answer in answers], "answer": answers}

    def _await(self, outcome: AsyncResult[float | NoScoreError], end: float) -> float | NoScoreError:
        # The threads watch the time, too, but a server that sends byte after byte keeps one for ever.
        try:
            return outcome.get(max(0.0, end - time.monotonic()))
        except multiprocessing.TimeoutError:
            return self._too_late()

    def _too_late(self, last: str = "") -> NoScoreError:
        limit = f"{self._settings.deadline_s:g} s ({self._settings.key}.deadline_s)"
        return NoScoreError(f"no answer within {limit}{last}")

    def _outcome(self, pixels_HWC: NDArray[np.uint8], prompt: str, end: float) -> float | NoScoreError:
        try:
            answer = read_answer(self._complete(self._request(pixels_HWC, prompt), end), self._template)
        except NoScoreError as error:
            return error
        worst, best = self._template.scale
        if not min(worst, best) <= answer <= max(worst, best):
            return NoScoreError(f"expected a score between {worst:g} and {best:g}, got {answer:g}")
        return answer

    def _request(self, pixels_HWC: NDArray[np.uint8], prompt: str) -> bytes:
        """The body of the request, in JSON."""
        file = io.BytesIO()
        Image.fromarray(pixels_HWC).save(file, format="PNG")
        image_url = {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"}
        content = [
            {"type": "image_url", "image_url": image_url},
            {"type": "text", "text": self._template.text.replace("{prompt}", prompt)},
        ]
        body: dict[str, object] = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._settings.max_tokens,
            "temperature": self._settings.temperature,
        }
        if self._template.levels is not None:  # of the first token, and as many alternatives to it as the API allows
            body |= {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        return json.dumps(body).encode()

    def _complete(self, request: bytes, end: float) -> Any:
        """The server's completion, decoded, from as many requests as it takes and there is time for."""
        attempt, failures, last = 0, 0, ""
        while (left_s := end - time.monotonic()) > 0:
            try:
                completion = self._post(request, min(self._settings.timeout_s, left_s))
                self._has_answered = True
                return completion
            except _RetryError as error:
                is_away = self._has_answered and error.final is UnreachableError
                if failures == self._settings.retries and not is_away:
                    raise error.final(str(error)) from None
                failures += not is_away
                last = f"; last: {error}"
            longest_s = min(self._settings.backoff_s * 2.0 ** min(attempt, 16), LONGEST_BACKOFF_S)
            longest_s = max(longest_s, AWAY_S if is_away else 0.0)
            wait_s = longest_s * _JITTER.uniform(0.5, 1)  # what failed at once must not come back at once
            if time.monotonic() + wait_s >= end:
                break
            time.sleep(wait_s)
            attempt += 1
        raise self._too_late(last)

    def _post(self, request: bytes, timeout_s: float) -> Any:
        parts = urlsplit(self._url)
        make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        with closing(make(parts.hostname or "", parts.port, timeout=timeout_s)) as connection:
            try:
                connection.connect()
            except OSError as error:
                raise _RetryError(f"{type(error).__name__}: {error}", final=UnreachableError) from None
            try:
                connection.request("POST", f"{parts.path}/chat/completions", request, self._headers)
                response = connection.getresponse()
                content = response.read()
            except (OSError, http.client.HTTPException) as error:
                raise _RetryError(f"{type(error).__name__}: {error}") from None
        self._check(response.status, content)
        try:
            return json.loads(content)
        except ValueError:
            raise _RetryError(f"expected JSON, got {_start(content.decode(errors='replace'))}") from None

    def _check(self, status: int, content: bytes) -> None:
        """Returns where the server answered with a completion."""
        if status == 200:
            return
        reason = f"{status} {http.client.responses.get(status, '')}: {_start(content.decode(errors='replace'))}"
        if status in (401, 403, 404):  # the next image would fare no better
            raise UserError(
                f"{self._settings.key}: {self._url}/chat/completions answered {reason}; check url and model "
                f"({self._settings.model}) there, and the environment variable {KEY_VARIABLE}"
            )
        if status in (408, 429) or status >= 500:
            raise _RetryError(reason)
        raise NoScoreError(reason)

    def _report(self, failures: Sequence[NoScoreError], num_images: int) -> None:
        if not failures:
            return
        is_unreachable = len(failures) == num_images and all(isinstance(each, UnreachableError) for each in failures)
        if is_unreachable and not self._has_answered:
            raise UserError(
                f"{self._settings.key}.url: {self._url} takes no connection ({failures[0]}), after "
                f"{self._settings.retries} retries; is the server running?"
            )
        warnings.warn(
            f"{self._settings.key}: {len(failures)} of {num_images} images have no score; the first: {failures[0]}",
            stacklevel=3,
        )


def read_answer(completion: Any, template: Template) -> float:
    """The score that a completion gives, on the template's scale.

    Args:
        completion: what `/chat/completions` answers, decoded.

    Raises:
        NoScoreError: it gives none.
    """
    try:
        choice = completion["choices"][0]
        if template.levels is not None:
            alternatives = choice["logprobs"]["content"][0]["top_logprobs"]
            return expected_level({item["token"]: item["logprob"] for item in alternatives}, template.levels)
        answer = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        wanted = "log-probabilities of its first token" if template.levels is not None else "an answer"
        raise NoScoreError(f"expected a completion with {wanted}, got {_start(json.dumps(completion))}") from None
    assert template.pattern is not None
    return match_score(answer, template.pattern)


def match_score(answer: object, pattern: str) -> float:
    """The number in the last match of `pattern`, or the mean of those in its groups.

    The last, because a model that thinks aloud ends with what it means.

    Raises:
        NoScoreError: nothing matches, or a group is no number.
    """
    *_, last = [None, *re.finditer(pattern, answer if isinstance(answer, str) else "")]
    try:
        numbers = [float(group) for group in last.groups()] if last is not None else []
    except (TypeError, ValueError):
        numbers = []
    if not numbers:
        given = _start(str(answer))
        raise NoScoreError(f"expected an answer with a number where {pattern!r} has its groups, got {given}")
    return sum(numbers) / len(numbers)


def expected_level(log_prob_of: Mapping[str, float], levels: Mapping[str, float]) -> float:
    """The mean of `levels`, weighted with the probabilities of the tokens that begin their words.

    A token counts for a level where it is the word or its beginning, in whatever case, since a tokenizer may cut words.
    No two words may begin alike. Levels that no token stands for have probability 0.

    Args:
        log_prob_of: the likeliest tokens of the answer's first place, with their log-probabilities.

    Raises:
        NoScoreError: none of them begins a level.
    """
    weights = dict.fromkeys(levels, 0.0)
    for token, log_prob in log_prob_of.items():
        piece = token.strip().lower()
        for level in levels:
            if piece and level.startswith(piece):
                weights[level] += math.exp(log_prob)
    total = sum(weights.values())
    if total == 0:
        raise NoScoreError(f"expected one of {', '.join(levels)}, got {', '.join(map(repr, list(log_prob_of)[:5]))}")
    return sum(weight * levels[level] for level, weight in weights.items()) / total


def _checked_url(settings: JudgeConfig) -> str:
    url = settings.url
    expected = "expected the address of an OpenAI-compatible server's API, as http://localhost:8000/v1"
    if url is None:
        raise UserError(f"{settings.key}.url: not set; {expected}")
    if not is_url(url):
        raise UserError(f"{settings.key}.url: {expected}, got {url!r}")
    return url.rstrip("/")


def _template(settings: JudgeConfig) -> Template:
    """The template that the settings name or are, with their pattern and scale where they have one."""
    named = TEMPLATES.get(settings.template)
    if named is None and not re.search(r"\s|{prompt}", settings.template):
        raise UserError(
            f"{settings.key}.template: no template {settings.template!r}{suggest(settings.template, TEMPLATES)} known: "
            f"{', '.join(TEMPLATES)}; or give a text of your own, with {{prompt}} where the prompt goes"
        )
    template = named or _own_template(settings)
    if settings.pattern is not None:
        template = replace(template, pattern=_checked_pattern(settings, settings.pattern), levels=None)
    if settings.scale is not None:
        template = replace(template, scale=_checked_scale(settings, settings.scale))
    return template


def _own_template(settings: JudgeConfig) -> Template:
    for key in ("pattern", "scale"):
        if getattr(settings, key) is None:
            raise UserError(
                f"{settings.key}.{key}: not set; expected one, since {settings.key}.template is of your own"
            )
    assert settings.scale is not None
    return Template(text=settings.template, pattern=settings.pattern, scale=settings.scale)


def _checked_scale(settings: JudgeConfig, scale: tuple[float, float]) -> tuple[float, float]:
    if scale[0] == scale[1]:
        raise UserError(f"{settings.key}.scale: expected two different numbers, got {list(scale)}")
    return scale


def _checked_pattern(settings: JudgeConfig, pattern: str) -> str:
    try:
        num_groups = re.compile(pattern).groups
    except re.error as error:
        raise UserError(f"{settings.key}.pattern: {pattern!r} is no regular expression: {error}") from None
    if num_groups == 0:
        raise UserError(
            f"{settings.key}.pattern: expected a group for the score, as 'Score: ([0-9.]+)', got {pattern!r}"
        )
    return pattern


def _start(text: str) -> str:
    """The beginning of what a server said, on one line."""
    line = " ".join(text[:1000].split())
    return repr(line if len(line) <= 120 else f"{line[:120]}...")
