"""The training loop: prompts, rollout, scores, advantages, gradients, one optimizer step; checkpoints and evaluations.

An iteration is a pure function of (configuration, weights, iteration number): every random draw is named by them. So a
run that resumes from a checkpoint ends where an uninterrupted one ends, to the bit where kernels repeat theirs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from dgpo_fast.algorithms import find_algorithm
from dgpo_fast.algorithms.base import Algorithm
from dgpo_fast.checkpoint import Checkpoint, load_newest, rotate
from dgpo_fast.config import Config, check_ranks, refuse_used
from dgpo_fast.environment import peak_memory_gb
from dgpo_fast.errors import UserError
from dgpo_fast.evaluate import Metrics, draw_images, evaluate_view
from dgpo_fast.guard import STOPPED, Guard
from dgpo_fast.held_out import headline, untold_terms
from dgpo_fast.interruption import Interrupted, Interruption
from dgpo_fast.learner import Learner
from dgpo_fast.metrics import read_evaluations
from dgpo_fast.models.engines import View, describe_engine
from dgpo_fast.models.lora import read_lora
from dgpo_fast.models.sources import find_model, hub_commit
from dgpo_fast.ops.registry import describe_serving
from dgpo_fast.parallel.placement import placement_of
from dgpo_fast.parallel.world import World
from dgpo_fast.profiling import StageClock, stage, use_clock
from dgpo_fast.prompts import PromptSampler, digest_of, load_prompts
from dgpo_fast.records import LossOutput, PromptBatch, Rollout, ScoredGroups, StepReport
from dgpo_fast.rewards import OverlappedScoring, Scorer, Scores
from dgpo_fast.rewards.grouping import scored_groups
from dgpo_fast.rewards.prompt_checks import check_prompts
from dgpo_fast.run_directory import RunDirectory, begun_with
from dgpo_fast.step_metrics import step_metrics

TIMES = ("rollout", "reward", "train")


class Unscored(UserError):
    """The samples of an iteration have no scores, on every rank alike, and nothing was learnt from them."""


class Trainer:
    """Fine-tunes the model of a recipe and writes the run directory `out`.

    Raises:
        UserError: what is wrong with the recipe, the model, the prompts, the rewards or the checkpoint to go on from.
    """

    def __init__(self, config: Config, out: Path, *, resume: bool = False) -> None:
        self.out, self.resumed = out, resume
        self.world = World.from_environment(config)
        if resume:  # as rank 0 sees the run
            commits = self.world.gather_objects(begun_with(out, config) if self.world.is_first else None)
            config = config.at_commit(commits[0])
        elif self.world.is_first:
            refuse_used(out)
        check_ranks(config, self.world.size)
        placement = placement_of(config, self.world.size)
        self.samples_of_ranks = placement.samples_of_ranks(total=config.images_per_iteration)
        test, train = (_prompts(config, split) for split in ("test", "train"))
        self.prompt_digests = {"test": digest_of(test), "train": digest_of(train)}
        _refuse_unlike_prompts(self.prompt_digests, self.world)
        if (saved := load_newest(out, self.world) if resume else None) is not None:
            _refuse_other_prompts(saved, self.prompt_digests)
        self.test_prompts = test[: config.evaluation.num_prompts]
        self.prompts = PromptSampler(train, per_iteration=config.groups.per_iteration, seed=config.seed)
        self.scorer = Scorer(config.rewards, device=self.world.device)
        self.warning: str | None = None  # of the last iteration
        self.clock = StageClock(synchronize=self.world.wait_for_device)
        use_clock(self.clock)
        self.interruption = Interruption(self.world)
        self.updates = config.optimizer.steps_per_iteration
        self.algorithm: Algorithm = find_algorithm(config, self.world)  # type: ignore[type-arg]
        with stage("loading"):
            self.learner = Learner(config, self.world)
            self.policy = self.learner.policy
            self.config = config.at_commit(self._commit(config))
            self.unconditional = self.policy.model.encode([""])
        self.guard = Guard(config)
        self.step, self.saved_step, self.wall_s = 0, 0, 0.0
        self.base_metrics: Metrics | None = None
        if saved is not None:
            self._restore(saved)
        elif config.begins_with is not None:
            assert config.adapter is not None
            self.learner.begin_with(read_lora(config.begins_with, self.learner.engine.shapes, config.adapter))
        # Of rank 0, which wrote them. Later ones are made again.
        mine = read_evaluations(out) if resume and self.world.is_first else []
        self.past = [line for line in self.world.gather_objects(mine)[0] if line["step"] <= self.step]
        if self.past:
            self.base_metrics = self.past[0]["base"]
        self.scores = {line["step"]: headline(line["tuned"], config.rewards) for line in self.past}
        self.readiness = self.algorithm.prepare(self.policy)

    def train(self) -> None:
        """Runs until `steps` steps are done. Saves and raises SystemExit(130 or 143) on a signal, (1) for the guard."""
        run = RunDirectory(
            self.out, self.config, self.guard, clock=self.clock, start_step=self.step, past=self.past,
            resumed=self.resumed, is_first=self.world.is_first,
        )  # fmt: skip
        # At the end all wait: a launcher ends every rank once one is gone, and the first may still write the report.
        try:
            with self.scorer, run, self.interruption:
                status = self._train(run)
        except Unscored:
            self.world.wait()
            raise
        self.world.wait()
        if status:
            self.world.leave()
            raise SystemExit(status)

    def _train(self, run: RunDirectory) -> int:
        """The exit status: 0 once all steps are made, else of the signal, or the guard, that ended it."""
        run.say(f"{describe_serving(self.world.device.type)}\n{describe_engine(self.policy.model)}\n{self.readiness}")
        try:
            self._look_up_from_work(run)
            while self.step < self.config.steps:
                for report in self.run_iteration():
                    run.log_step(report)
                if self.warning is not None:
                    run.say(self.warning)
                self._look_up_from_work(run)
        except Unscored:
            if self.step != self.saved_step:
                self._save_what_was_learnt(run)
            raise
        except Interrupted as interrupted:
            self._save_checkpoint()
            run.say(f"stopped after step {self.step} of {self.config.steps}, saved; {interrupted.way_on} from here")
            return interrupted.status
        return 0

    def run_iteration(self) -> list[StepReport]:
        """One iteration: sample groups, score them, learn from them, in one optimizer step or some.

        A report for each of these; what they have in common, such as the time of the rollout, they share alike.
        """
        start, before = time.perf_counter(), dict(self.clock.seconds)
        scored, reward_metrics = self._sample()
        with stage("train"):
            of_steps = [self._learn(scored, update) for update in range(self.updates)]
            with stage("optimizer"):
                self.algorithm.after_iteration(self.policy, self.step - 1)
        elapsed, updates = time.perf_counter() - start, self.updates
        spent = {name: self.clock.seconds[name,] - before.get((name,), 0.0) for name in TIMES}
        images, first, wall_s = self.config.images_per_iteration, self.step - updates, self.wall_s
        self.wall_s += elapsed
        return [
            StepReport.of(
                step=step, iteration=(step - 1) // updates, images_seen=step * images // updates,
                wall_s=wall_s + elapsed * (step - first) / updates, **reward_metrics, **train_metrics,
                rollout_s=spent["rollout"] / updates, reward_s=spent["reward"] / updates,
                train_s=spent["train"] / updates, images_per_s=images / elapsed,
                peak_memory_gb=peak_memory_gb(self.world.device),
            )
            for step, train_metrics in enumerate(of_steps, start=first + 1)
        ]  # fmt: skip

    def _commit(self, config: Config) -> str | None:
        """Of the model, if it is the hub's: from now on this one, whatever is pushed until the run is over."""
        model = config.model
        source = find_model(model.name, revision=model.version)
        commits = self.world.gather_objects(hub_commit(source))
        if len({*commits}) > 1:
            found = ", ".join(sorted(map(str, {*commits})))
            raise UserError(f"model.commit: ranks have different commits of {model.name}, {found}: name one of them")
        return commits[0]

    @property
    def iteration(self) -> int:
        return self.step // self.updates

    def _sample(self) -> tuple[ScoredGroups, dict[str, Any]]:
        """Groups of samples with their scores, and what of them is reported.

        Raises:
            Unscored: they have none.
            UserError: on this rank alone, where others cannot be told before their next collective.
        """
        view, error = self.config.sampling_view(self.step), None
        self.policy.make_ready(view)
        try:
            rollout, scores = self._draw(view)
        except UserError as raised:
            if self.config.parallel.gathers_as_it_draws:
                raise
            error = raised
        if self.interruption.check(failed=error is not None):
            of_ranks = self.world.gather_objects(None if error is None else str(error))
            raise Unscored(next(message for message in of_ranks if message is not None)) from error
        assert scores is not None
        try:
            with stage("reward"):
                return self._score(rollout, scores)
        except UserError as error:  # what ranks find together
            raise Unscored(str(error)) from error

    def _draw(self, view: View) -> tuple[Rollout, Scores | None]:
        """This rank's samples, and their scores, unless a signal came: then some may lack."""

        at_once = self.config.rollout.decoded_at_once
        with OverlappedScoring(
            self.scorer, self.policy.model, images_per_decode=at_once, num_images=self.config.images_per_iteration,
            is_over=lambda: self.interruption.is_requested,
        ) as scoring, stage("rollout"):  # fmt: skip
            rollout = self.algorithm.rollout(
                self.policy, view, self._next_prompts(), deliver=scoring.add, check=self.interruption.check_alone
            )  # fmt: skip
        return rollout, None if self.interruption.is_requested else scoring.scores()

    def _next_prompts(self) -> PromptBatch:
        """This rank's share of the iteration."""
        samples, size = self.samples_of_ranks[self.world.rank], self.config.groups.size
        groups = sorted({sample // size for sample in samples})
        drawn = self.prompts.draw(self.iteration)
        prompts = tuple(drawn[group] for group in groups)
        soon = self.prompts.upcoming(self.iteration + 1, self.config.steps // self.updates, groups)
        return PromptBatch(
            iteration=self.iteration, samples=samples, group_size=size, prompts=prompts,
            conditioning=self.policy.model.encode(prompts, soon=soon), unconditional=self.unconditional,
        )  # fmt: skip

    def _score(self, rollout: Rollout, scores: Scores) -> tuple[ScoredGroups, dict[str, Any]]:
        """Rewards and advantages, and what of them is reported."""
        grouped = scored_groups(
            rollout, scores, self.config, world=self.world, samples_of_ranks=self.samples_of_ranks
        )  # fmt: skip
        self.warning = grouped.warning
        return grouped.scored, grouped.metrics

    def _learn(self, scored: ScoredGroups, update: int) -> dict[str, Any]:
        """The gradient of all micro-batches of a step on all ranks, then the step: number `update` of the iteration.

        One whose groups were all left out, or that the algorithm has nothing for, on every rank alike, is only counted.
        """
        outputs: list[LossOutput] = []
        for batches in self.algorithm.batches(scored, update=update) if scored.num_groups[update] else ():
            weights = self.algorithm.group_weights(self.policy, batches) or [None] * len(batches)
            for batch, weight in zip(batches, weights, strict=True):
                outputs.append(self.algorithm.loss(self.policy, batch, weight))
                with stage("backward"):
                    self.learner.backward(outputs[-1].loss)
            if update == 0:  # behind a step the iteration is finished first: runs go on between iterations alone
                self.interruption.check_alone()
        if not outputs:
            made = self.learner.leave_out(self.step, lr_factor=self.guard.lr_factor)
            self.step += 1
            return {**made, "loss": None}
        with stage("optimizer"):
            made = self.learner.step(self.step, lr_factor=self.guard.lr_factor)
        self.step += 1
        return {**made, **step_metrics(outputs, scored, self.policy, self.world, update=update)}

    def _look_up_from_work(self, run: RunDirectory) -> None:
        """What is due between iterations, or on resume was: checkpoint, samples, and last what takes longest."""
        config, ends = self.config, (0, self.config.steps)

        def is_due(every: int) -> bool:
            return self.step in ends or (every > 0 and self.step % every < self.updates)

        if self.step > 0 and (is_due(config.checkpoints.every) or is_due(config.evaluation.every)):
            self._save_checkpoint()
        if is_due(config.logging.samples_every):
            self._save_samples(run)
        if is_due(config.evaluation.every) and self.step not in self.scores:
            self._evaluate(run)
        if self.guard.stops and self.step < self.config.steps:  # a finished run has been told all the same
            raise Interrupted(STOPPED, way_on=self.guard.way_on)
        self.interruption.check()

    def _evaluate(self, run: RunDirectory) -> None:
        """Held-out metrics of the evaluation EMA; before the first step it is the base, or the LoRA it began with."""
        measure = partial(
            evaluate_view, prompts=self.test_prompts, config=self.config, scorer=self.scorer.with_monitors,
            world=self.world,
            check=self.interruption.check, is_over=lambda: self.interruption.is_requested, say=run.say,
        )  # fmt: skip
        if self.base_metrics is None:
            self.base_metrics = measure(self.policy, "ref")
            if (untold := untold_terms(self.base_metrics, self.config.rewards)) and not self.resumed:
                run.say(
                    f"rewards.terms: which of the metrics {', '.join(self.base_metrics)} are those of "
                    f"{', '.join(untold)} cannot be told: name each by `metric`, or checkpoints/best goes by the first "
                    "reward alone, and the guard does not look at held-out rewards"
                )
        is_base = self.step == 0 and self.config.begins_with is None
        tuned = self.base_metrics if is_base else measure(self.policy, "ema")
        unknown = dict.fromkeys([*self.base_metrics, *tuned], math.nan)  # where a monitor failed for all
        self.base_metrics, tuned = unknown | self.base_metrics, unknown | tuned
        score = self.scores[self.step] = headline(tuned, self.config.rewards)
        run.log_evaluation(
            self.step, num_prompts=len(self.test_prompts), base=self.base_metrics, tuned=tuned, score=score
        )
        if self.world.is_first:
            rotate(self.out, self.scores, keep_last=self.config.checkpoints.keep_last)

    def _save_samples(self, run: RunDirectory) -> None:
        prompts = self.test_prompts[: self.config.logging.num_samples]
        with stage("evaluate"):
            images = draw_images(self.policy, "ema", prompts, self.config, images_per_prompt=1)
        run.save_samples(self.step, images, prompts)

    def _save_what_was_learnt(self, run: RunDirectory) -> None:
        """What then goes wrong is said: why it is saved is more to the point, and comes behind."""
        try:
            self._save_checkpoint()
        except UserError as error:
            run.say(str(error))
        else:
            run.say(f"saved after step {self.step}, from which --resume goes on")

    def _save_checkpoint(self) -> None:
        with stage("checkpoint"):
            values = {
                "wall_s": self.wall_s, "stages": self.clock.by_name(), "guard": self.guard.state(),
                "base": self.base_metrics, "prompts": self.prompt_digests,
            }  # fmt: skip
            self.learner.save(self.out, self.step, values)
            self.saved_step = self.step
            if self.world.is_first:
                rotate(self.out, self.scores, keep_last=self.config.checkpoints.keep_last)
            self.world.wait()

    def _restore(self, saved: Checkpoint) -> None:
        self.learner.restore(saved)
        self.base_metrics = saved.values.get("base")
        self.clock.add(saved.values["stages"])
        self.guard.restore(saved.values.get("guard"))
        self.step, self.saved_step, self.wall_s = saved.step, saved.step, saved.values["wall_s"]


def _refuse_other_prompts(saved: Checkpoint, digests: Mapping[str, str]) -> None:
    for split, digest in saved.values.get("prompts", {}).items():
        if digest != digests[split]:
            raise UserError(f"prompts.{split}: these are other prompts than those that the run began with")


def _refuse_unlike_prompts(digests: Mapping[str, str], world: World) -> None:
    """Makes sure that ranks, each of which reads them for itself, have the same."""
    of_ranks = world.gather_objects(digests)
    for split in digests:
        if len({each[split] for each in of_ranks}) > 1:
            raise UserError(f"prompts.{split}: ranks read different prompts; they must be the same on every machine")


def _prompts(config: Config, split: Literal["test", "train"]) -> list[str]:
    """Prompts by each of which every reward can judge."""
    key = f"prompts.{split}"
    prompts = load_prompts(getattr(config.prompts, split), key=key)
    check_prompts(prompts, config.rewards, key=key)
    return prompts
