"""Settings of every test, the short training run that several look at, and policies of the embedded pipeline."""

from __future__ import annotations

import copy
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from packaging.version import Version

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

    from dgpo_fast.config import Config
    from dgpo_fast.models.adapters import AdapterPolicy
    from dgpo_fast.models.sd3 import StableDiffusion3

# A shared machine stalls for longer than Hypothesis' deadline; time is measured in benchmarks, not in tests.
settings.register_profile("dgpo-fast", deadline=None)
# Triton's interpreter takes milliseconds for a program.
settings.register_profile("interpreted", deadline=None, max_examples=5)
settings.load_profile("interpreted" if os.environ.get("TRITON_INTERPRET") == "1" else "dgpo-fast")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--device cuda` runs the operators' tests on a GPU, `--implementation native` those of one implementation."""
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the operators' tests run")
    parser.addoption("--implementation", help="tests of this implementation of the operators only")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Prompt embeddings of this process and its children: never in the user's own cache."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DGPO_FAST_CACHE", str(directory))
        yield directory


@pytest.fixture
def interpreter_environ() -> dict[str, str]:
    """The environment of a process whose operators are Triton's, in its interpreter, on the CPU."""
    triton, numpy = (Version(version(name)) for name in ("triton", "numpy"))
    if triton < Version("3.7") and numpy >= Version("2.4"):
        pytest.skip(f"the interpreter of Triton {triton} needs NumPy below 2.4: it reads no loop's end from {numpy}")
    return {**os.environ, "TRITON_INTERPRET": "1", "DGPO_FAST_OPS": "triton", "OMP_NUM_THREADS": "1"}


OWN_REWARDS = Path(__file__).parent / "rewards"

# Six steps of a second or less. Every kind of state matters to them: the old policy samples from step 5 on and trails
# the policy, the evaluation average moves every second step, the learning rate still rises after the first checkpoint.
QUICK = (
    "device=cpu", "steps=6", "model.sampling=auto", "adapter.rank=4", "adapter.alpha=8",
    "groups.size=4", "groups.per_iteration=2", "optimizer.images_per_micro_batch=4", "optimizer.warmup_steps=4",
    "optimizer.lr=3e-4", "optimizer.decay_steps=null", "algorithm.kl_cfg=1", "algorithm.kl_coef=0.02",
    "rollout.steps=3", "rollout.switch_step=4", "rollout.images_per_forward=4",
    "algorithm.trunc=2", "algorithm.train_timesteps=1", "old_policy.rate=0.1", "evaluation_ema.every=2",
    "evaluation.every=3", "evaluation.steps=2", "evaluation.num_prompts=2", "evaluation.images_per_prompt=4",
    "checkpoints.every=3", "logging.num_samples=2", "logging.samples_every=0", "logging.tensorboard=false",
    "rewards.terms=[{name: 'misbehaving:Brightness'}, {name: shapes, metric: soft, weight: 0.1}]",
)  # fmt: skip


@pytest.fixture
def files_up_to() -> Callable[[int], AbstractContextManager[None]]:
    """`with files_up_to(n)`: the system itself refuses to let a file grow beyond n bytes, as a full disk would.

    Only around the call under test: pytest's own report is written by this process too, often to a larger file.
    """

    @contextmanager
    def limited(num_bytes: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="session")
def quick() -> tuple[str, ...]:
    """Overrides that make a short run of `tiny-dgpo`, scored by the reward in rewards/misbehaving.py and by its own."""
    if str(OWN_REWARDS) not in sys.path:
        sys.path.append(str(OWN_REWARDS))
    return QUICK


@pytest.fixture(scope="session")
def child_environment() -> dict[str, str]:
    """Environment of a process that trains as this one does: the same package, rewards and number of threads."""
    import torch

    path = os.pathsep.join([str(OWN_REWARDS), str(OWN_REWARDS.parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}


@pytest.fixture(scope="session")
def straight_run(tmp_path_factory: pytest.TempPathFactory, quick: tuple[str, ...]) -> Path:
    """Directory of a run that nothing interrupted. Not to be changed: copy it."""
    from dgpo_fast import Trainer, load_recipe

    out = tmp_path_factory.mktemp("runs") / "straight"
    Trainer(load_recipe("tiny-dgpo", [*quick, "logging.tensorboard=true"]), out).train()
    return out


@pytest.fixture(scope="session")
def straight_two_ranks(
    tmp_path_factory: pytest.TempPathFactory, quick: tuple[str, ...], child_environment: dict[str, str]
) -> Path:
    """The directory of that run on two ranks of one torchrun, with a thread each. Not to be changed: copy it."""
    out = tmp_path_factory.mktemp("runs") / "straight-two-ranks"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = ["-m", "dgpo_fast", "train", "tiny-dgpo", "--out", out, *(f"--set={item}" for item in quick)]
    subprocess.run([*command, *arguments], env={**child_environment, "OMP_NUM_THREADS": "1"}, check=True)
    return out


@pytest.fixture(scope="session")
def assert_ends_alike() -> Callable[[Path, Path], None]:
    """Compares the ends of two runs to the bit: every tensor of the last checkpoint, every metric and evaluation."""
    from safetensors.torch import load_file

    from dgpo_fast.checkpoint import last_checkpoint
    from dgpo_fast.metrics import read_evaluations, read_metrics

    clock_and_memory = {"wall_s", "rollout_s", "reward_s", "train_s", "images_per_s", "peak_memory_gb"}

    def bits(run: Path) -> dict[str, bytes]:
        last = last_checkpoint(run)
        return {
            f"{path.relative_to(run)}: {name}": tensor.numpy().tobytes()
            for path in sorted(last.rglob("*.safetensors"))
            for name, tensor in load_file(path).items()
        }

    def numbers(run: Path) -> list[dict[str, object]]:
        return [{key: line[key] for key in line.keys() - clock_and_memory} for line in read_metrics(run)]

    def compare(run: Path, straight: Path) -> None:
        mine, others = bits(run), bits(straight)
        assert len(mine) > 0 and mine.keys() == others.keys()
        assert [name for name in mine if mine[name] != others[name]] == []
        assert numbers(run) == numbers(straight)
        assert read_evaluations(run) == read_evaluations(straight)

    return compare


# What loads torch and diffusers is imported where it is used: most tests need neither.
@pytest.fixture(scope="session")
def embedded_pipeline() -> StableDiffusion3Pipeline:
    """The embedded pipeline in float32, loaded once and shared: to be called, never to be changed."""
    from dgpo_fast.config import load_recipe
    from dgpo_fast.models.sd3 import load_pipeline

    pipeline = load_pipeline(load_recipe("tiny-dgpo").model, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def make_model(embedded_pipeline: StableDiffusion3Pipeline) -> Callable[[Config], StableDiffusion3]:
    """Makes the model of a configuration from a copy of the embedded pipeline. It knows no prompt yet."""
    import torch
    from diffusers import StableDiffusion3Pipeline

    from dgpo_fast.models.sd3 import DTYPES, StableDiffusion3
    from dgpo_fast.models.text import TextEncoders

    def make(config: Config) -> StableDiffusion3:
        copied = StableDiffusion3Pipeline(**copy.deepcopy(embedded_pipeline.components))
        copied.set_progress_bar_config(disable=True)
        dtype, device = DTYPES[config.model.dtype], torch.device("cpu")
        text = TextEncoders(
            lambda: copied, dtype=dtype, text_length=config.model.text_length, device=device, cache=None
        )
        return StableDiffusion3(copied.to(dtype), text, config.model, device=device)

    return make


@pytest.fixture(scope="session")
def make_policy(make_model: Callable[[Config], StableDiffusion3]) -> Callable[..., AdapterPolicy]:
    """Gives the policy of a configuration as a new one would be; equal configurations share it, one test at a time.

    `spread` fills every view with random weights of its own of that deviation.
    """
    import torch

    from dgpo_fast.models.adapters import AdapterPolicy
    from dgpo_fast.models.policy import TRAINED

    made: dict[tuple[object, ...], tuple[AdapterPolicy, torch.Tensor]] = {}

    def make(config: Config, *, spread: float = 0.0) -> AdapterPolicy:
        key = (config.model, config.adapter, config.seed)
        if key not in made:
            policy = AdapterPolicy(make_model(config), config.adapter, seed=config.seed)
            made[key] = policy, policy.trainable.detach().clone()
        policy, initial = made[key]
        generator = torch.Generator().manual_seed(1)
        for view in TRAINED:
            random = spread * torch.randn(len(initial), generator=generator)
            policy.set_weights(view, random if spread else initial)
        policy.collect_gradient()
        assert policy.trainable.grad is not None
        policy.trainable.grad.zero_()
        return policy

    return make
