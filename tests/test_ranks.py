"""Two ranks draw what one draws and learn what one learns. One launch serves every test here."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from dgpo_fast import Trainer, load_recipe
from dgpo_fast.checkpoint import last_checkpoint, list_checkpoints, load_checkpoint
from dgpo_fast.config import check_ranks
from dgpo_fast.errors import UserError
from dgpo_fast.learner import Learner
from dgpo_fast.metrics import read_evaluations, read_metrics
from dgpo_fast.models.adapters import AdapterPolicy
from dgpo_fast.models.sd3 import load_model
from dgpo_fast.parallel.weights import fingerprint
from dgpo_fast.parallel.world import World
from dgpo_fast.trainer import _refuse_unlike_prompts

T = TypeVar("T")
CPU = torch.device("cpu")

# An eps far above every gradient makes Adam's step proportional to the gradient: with the usual one it is nearly the
# gradient's sign, which rounding flips where that is about zero.
OVERRIDES = (
    "algorithm.train_timesteps=2", "rewards.terms=[{name: 'misbehaving:Brightness'}]",
    "optimizer.eps=1.0", "optimizer.lr=1.0", "optimizer.warmup_steps=0", "optimizer.weight_decay=0",
)  # fmt: skip


IN_THIRD_STEP = 4  # call of the reward on each rank: 1 is the evaluation of the base, 2 and 3 are steps


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, quick: tuple[str, ...]) -> Iterator[Path]:
    """A run of this process alone, with one thread, as each of the two ranks has."""
    out, threads = tmp_path_factory.mktemp("one") / "run", torch.get_num_threads()
    torch.set_num_threads(1)
    Trainer(load_recipe("tiny-dgpo", [*quick, *OVERRIDES, "steps=2"]), out).train()
    yield out
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def two_ranks(
    tmp_path_factory: pytest.TempPathFactory, quick: tuple[str, ...], child_environment: dict[str, str]
) -> Path:
    """The same two steps on two ranks that torchrun started; in the third the second rank alone receives SIGTERM."""
    out = tmp_path_factory.mktemp("two") / "run"
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "dgpo_fast", "train", "tiny-dgpo", "--out", out,
         *(f"--set={item}" for item in (*quick, *OVERRIDES, "steps=3", "checkpoints.every=9", "evaluation.every=0"))],
        env={**child_environment, "OMP_NUM_THREADS": "1", "MISBEHAVE": f"{IN_THIRD_STEP}:SIGTERM", "MISBEHAVING": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert process.returncode != 0
    assert "stopped after step 2 of 3, saved" in process.stderr
    return out


def test_the_first_step_draws_and_scores_the_same(one_rank: Path, two_ranks: Path) -> None:
    """To the bit, but for the gradient's sum: neither texts nor noises know of ranks, forwards are of four images."""
    one, two = read_metrics(one_rank), read_metrics(two_ranks)
    assert [line["step"] for line in two] == [1, 2]
    for key in ("images_seen", "zero_std_groups", "group_weight_mean", "kl", "reward_mean", "reward_std"):
        assert two[0][key] == one[0][key]
    assert two[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-6)
    base = [read_evaluations(run)[0]["base"]["brightness"] for run in (one_rank, two_ranks)]
    assert base[1] == pytest.approx(base[0], rel=1e-6)
    assert one[0]["reward_std"] > 1e-2


def policy_of(run: Path) -> Tensor:
    """The last checkpoint's adapters, end to end."""
    tensors = load_checkpoint(last_checkpoint(run)).tensors("policy")
    return torch.cat([tensor.flatten() for _, tensor in sorted(tensors.items())]).double()


def test_the_weights_are_those_of_one_rank(one_rank: Path, two_ranks: Path, quick: tuple[str, ...]) -> None:
    one, two = (policy_of(run) for run in (one_rank, two_ranks))
    config = load_recipe("tiny-dgpo", [*quick, *OVERRIDES])
    policy = AdapterPolicy(load_model(config.model, device="cpu"), config.adapter, seed=config.seed)
    slices = policy.trained.slices(policy.trainable.detach())
    start = torch.cat([tensor.flatten() for _, tensor in sorted(slices.items())])
    learned = (one - start).norm()
    assert learned > 0
    # Weights are rounded to float32 after each of two steps in each run. Gradients differ by what the rounding of a sum
    # of four in another order makes of them.
    assert (one - two).norm() <= 4 * 2**-24 * start.double().norm() + 1e-4 * learned


def test_the_second_step_goes_on_from_the_same(one_rank: Path, two_ranks: Path) -> None:
    """Images, losses and gradients of weights that agree to rounding."""
    one, two = read_metrics(one_rank)[1], read_metrics(two_ranks)[1]
    assert one["reward_mean"] != read_metrics(one_rank)[0]["reward_mean"]
    signals = ("diversity", "adapter_norm", "group_weight_saturation")
    for key in ("reward_mean", "reward_std", "loss", "dgpo_loss", "kl", "group_weight_mean", "grad_norm", *signals):
        assert two[key] == pytest.approx(one[key], rel=1e-4), key


def test_one_rank_writes(two_ranks: Path) -> None:
    """Though the signal reached the other: both stop after the same step, and the report is whole."""
    assert [path.name for path in list_checkpoints(two_ranks)] == ["step-000002"]
    assert len(read_evaluations(two_ranks)) == 1
    assert (two_ranks / "report.html").read_text().rstrip().endswith("</html>")


@pytest.mark.parametrize("total", [3, 8, 64, 65])
def test_shares_are_all_there_is(total: int) -> None:
    shares = [World(rank=rank, size=3, device=torch.device("cpu")).share(total) for rank in range(3)]
    assert [number for share in shares for number in share] == [*range(total)]
    assert max(map(len, shares)) == math.ceil(total / 3)


def test_groups_must_divide_among_ranks(quick: tuple[str, ...]) -> None:
    with pytest.raises(
        UserError, match=r"groups\.per_iteration: 2 groups of 4 images do not divide among 3 ranks; .*: 3"
    ):
        check_ranks(load_recipe("tiny-dgpo", quick), 3)


def test_micro_batches_must_divide_a_ranks_share(quick: tuple[str, ...]) -> None:
    refusal = r"images_per_micro_batch must divide .* share .*, 4 images on each of 2 ranks, got 8; .*: 4"
    with pytest.raises(UserError, match=refusal):
        check_ranks(load_recipe("tiny-dgpo", [*quick, "optimizer.images_per_micro_batch=8"]), 2)


def test_ranks_wait_for_each_others_rewards(quick: tuple[str, ...]) -> None:
    recipe = load_recipe("tiny-dgpo", [*quick, "rewards.timeout_s=1800"])
    check_ranks(recipe, 1)
    with pytest.raises(UserError, match=r"rewards\.timeout_s must be below parallel\.timeout_s, 1800, .* got 1800"):
        check_ranks(recipe, 2)


def test_every_rank_draws_a_held_out_prompt(quick: tuple[str, ...]) -> None:
    changes = ["groups.per_iteration=4", "evaluation.num_prompts=3"]
    with pytest.raises(UserError, match=r"evaluation\.num_prompts must be at least the number of ranks, 4, .* got 3"):
        check_ranks(load_recipe("tiny-dgpo", [*quick, *changes]), 4)


class Pair(World):
    """Rank 0 of two, the other of which has read something else."""

    def gather_objects(self, value: T) -> list[T]:
        return [value, self.spoilt(value)]

    def spoilt(self, value: T) -> T:
        return {"train": "other", "test": value["test"]} if isinstance(value, dict) else value + 1  # type: ignore


def test_ranks_must_read_the_same_prompts() -> None:
    pair, digests = Pair(rank=0, size=2, device=CPU), {"train": "some", "test": "more"}
    with pytest.raises(UserError, match=r"^prompts\.train: ranks read different prompts"):
        _refuse_unlike_prompts(digests, pair)
    _refuse_unlike_prompts(digests, World(rank=0, size=1, device=CPU))


def test_ranks_must_load_the_same_model(quick: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"^model\.name: ranks have loaded different weights"):
        Learner(load_recipe("tiny-dgpo", quick), Pair(rank=0, size=2, device=CPU))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_a_fingerprint_tells_weights_from_others(dtype: torch.dtype) -> None:
    """To the last bit, and wherever it is; views are what they show."""
    weights = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = fingerprint([weights, weights[0]])
    assert found == fingerprint([weights.T, weights[0].clone()])
    changed = weights.clone()
    bits = changed.view(-1)[-1:].view(torch.uint8)
    bits[0] ^= 1
    assert found != fingerprint([changed, weights[0]])
