"""The command line `dgpo-fast`. Results go to stdout, everything else to stderr.

Each command imports what it needs when it runs: help, the recipes and the refusal of a bad one come without torch.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dgpo_fast import launcher
from dgpo_fast.config import Config, change_config, dump_config, load_recipe, load_rewards, recipe_names, refuse_used
from dgpo_fast.errors import UserError
from dgpo_fast.files import write_atomically
from dgpo_fast.parallel import failures

app = typer.Typer(
    name="dgpo-fast",
    help="Fine-tunes Stable Diffusion 3.5 with online reinforcement learning (DGPO).",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
tiny = typer.Typer(help="The embedded pipeline.")
app.add_typer(tiny, name="tiny")

USER_ERROR = 2
LIBRARIES = ("accelerate", "deepspeed", "diffusers", "peft", "torch", "transformers")
# What the operator of a machine can mend, and no bug of ours causes: permissions, a full disk, a read-only one.
MENDABLE = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS)

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A name that `dgpo-fast recipes` lists, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as optimizer.lr=1e-4.")
]
RewardOverrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as rewards.pickscore.path=DIR."),
]
RunDirectory = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="What `dgpo-fast train` wrote.")]
Steps = Annotated[int | None, typer.Option(metavar="N", help="Optimizer steps; short for --set steps=N.")]
Seed = Annotated[int | None, typer.Option(metavar="S", help="Short for --set seed=S.")]
SaveEvery = Annotated[
    int | None, typer.Option(metavar="K", help="Steps between checkpoints; short for --set checkpoints.every=K.")
]
CheckpointStep = Annotated[
    str | None, typer.Option("--step", metavar="N", help="Of the checkpoint, or best; else the newest.")
]
Model = Annotated[
    str | None, typer.Option(metavar="MODEL", help="A directory or a name; short for --set model.name=...")
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 on success, 2 for a mistake of the user, 130 or 143 after a signal, else 1."""
    _quiet_libraries()
    if os.getcwd() not in sys.path:  # as `python -m` has it: rewards of the user's own may lie there
        sys.path.append(os.getcwd())
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0].startswith("--local_rank="):  # from DeepSpeed's launcher; LOCAL_RANK says the same
        given = given[1:]
    try:
        status: int | None = app(given or ["--help"], prog_name="dgpo-fast", standalone_mode=False)
    except UserError as error:
        _refuse(str(error))
    except typer.TyperException as error:
        message = error.format_message().rstrip(".")
        context = getattr(error, "ctx", None)  # of the command that was given, where one was
        _refuse(f"{message[0].lower()}{message[1:]} (see {context.command_path if context else 'dgpo-fast'} --help)")
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        _refuse(f"{error.filename or 'output'}: {error.strerror}")
    if status:
        failures.fail("it was interrupted")
    raise SystemExit(status)


@app.command()
def train(
    recipe: Recipe,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Run directory; runs/<recipe>-<time> where not given.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan; load nothing.")
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="With --dry-run: plan for so many ranks, not for the launcher's."),
    ] = None,
    overrides: Overrides = None,
    steps: Steps = None,
    save_every: SaveEvery = None,
    seed: Seed = None,
    model: Model = None,
) -> None:
    """Fine-tune a model."""
    if ranks is not None and not dry_run:
        raise UserError("--ranks plans, with --dry-run; to train on several, start with torchrun (docs/launch.md)")
    shorthands = {"steps": steps, "checkpoints.every": save_every, "seed": seed, "model.name": model}
    config = load_recipe(recipe, [*(overrides or []), *_as_overrides(shorthands)])
    if dry_run:
        from dgpo_fast import planning

        # Warnings have commands to be copied: no line of them is broken.
        Console().print(planning.render(planning.plan(config, num_ranks=ranks)), soft_wrap=True)
        return
    out = _run_directory_to_write(out, config, resume=resume)

    from dgpo_fast.trainer import Trainer

    with _out_of_memory_said(config, is_training=True):
        trainer = Trainer(config, out, resume=resume)
        trainer.train()
    trainer.world.leave()
    if launcher.is_first():
        _print_outcome(out)


@app.command("eval")
def evaluate(
    run_dir: RunDirectory,
    split: Annotated[Literal["train", "test"], typer.Option(help="Which prompts.")] = "test",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Save base above tuned images as a PNG.")] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="An evaluation recipe that `recipes` lists, or a YAML file.")
    ] = None,
    rewards: Annotated[
        list[str] | None, typer.Option("--reward", metavar="NAME", help="Instead of the run's rewards; repeatable.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Instead of the split's prompts: a file, or a source.")
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(metavar="N", min=1, help="Else as many as the run takes.")] = None,
    images_per_prompt: Annotated[int | None, typer.Option(metavar="N", min=1, help="Else the run's.")] = None,
    overrides: RewardOverrides = None,
    step: CheckpointStep = None,
    gallery: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write a page with all images and scores into a new directory.")
    ] = None,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="With --gallery: its images as they were drawn, for other programs.")
    ] = False,
    csv: Annotated[Path | None, typer.Option(metavar="FILE", help="Write every image's scores.")] = None,
    by: Annotated[
        str | None, typer.Option(metavar="KEY", help="Also by kind of prompt, such as GenEval's tag or category.")
    ] = None,
) -> None:
    """Compare base and fine-tuned model on held-out prompts, from the same noise."""
    from dgpo_fast.evaluation_config import evaluation_config

    config = evaluation_config(
        run_dir, split=split, recipe=recipe, overrides=overrides or [], rewards=rewards or [], prompts=prompts,
        num_prompts=num_prompts, images_per_prompt=images_per_prompt,
    )  # fmt: skip
    _check_file("--picture", picture, example="eval.png")
    _check_file("--csv", csv, example="eval.csv")
    if lossless and gallery is None:
        raise UserError("--lossless is for the images of --gallery DIR")
    if gallery is not None and launcher.is_first():  # the directory of all ranks, whose files it may see
        _check_writable(gallery)
        if any(gallery.iterdir()):
            raise UserError(f"--gallery {gallery} holds something already; name a new directory")
    from dgpo_fast.checkpoint import parse_step
    from dgpo_fast.evaluate import evaluate_run

    with _out_of_memory_said(config, is_training=False):
        found = evaluate_run(
            run_dir, config=config, split=split, step=parse_step(step), picture=picture, gallery=gallery,
            lossless=lossless, by=by,
        )  # fmt: skip
    if not launcher.is_first():
        return
    if csv is not None:
        write_atomically(csv, found.as_csv().encode())
    if as_json:
        print(json.dumps(found.as_json()))
        return
    console = Console()
    console.print(found.as_table())
    if by is not None:
        console.print()
        console.print(found.as_table_by_kind())
    for path in (csv, gallery and gallery / "index.html"):
        if path is not None:
            console.print(path, soft_wrap=True, highlight=False)


@app.command()
def sample(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="`embedded`, a directory in diffusers' format, or a hub name.")
    ],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to draw.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the images go.")],
    lora: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A checkpoint's lora/ directory, or an exported one.")
    ] = None,
    num: Annotated[int, typer.Option(metavar="N", min=1, help="Number of images.")] = 1,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="Image i starts from the noise of seed + i.")] = 0,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Solver steps; else the run's, or 28 where diffusers lacks its solver."),
    ] = None,
    guidance: Annotated[float | None, typer.Option(metavar="G", min=1, help="Else the run's, or 4.5.")] = None,
    resolution: Annotated[
        int | None, typer.Option(metavar="PIXELS", min=16, help="Else the run's, or the model's.")
    ] = None,
) -> None:
    """Draw images with diffusers' own pipeline. Settings not given are those of the run that made the LoRA or model."""
    from dgpo_fast.sampling import SampleOptions, draw

    options = SampleOptions.of(model, lora=lora, steps=steps, guidance=guidance, resolution=resolution)
    _check_writable(out)
    for path in draw(options, prompt, out=out, num=num, seed=seed):
        print(path)


@app.command()
def export(
    run_dir: RunDirectory,
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new directory.")],
    step: CheckpointStep = None,
) -> None:
    """Write what a run learnt as diffusers loads it: a LoRA directory, or the whole pipeline of full fine-tuning."""
    _check_writable(out.parent)
    from dgpo_fast.checkpoint import parse_step
    from dgpo_fast.export import export_run

    print(export_run(run_dir, out, step=parse_step(step)))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="RECIPE", help="Show all settings of this one instead.")] = None,
) -> None:
    """List the recipes that come with the package: for `train`, and below these for `eval`."""
    from dgpo_fast.evaluation_config import evaluation_recipe_names, load_evaluation_recipe

    if name is not None:
        print(dump_config(load_recipe(name)), end="")
        return
    names, for_eval = recipe_names(), evaluation_recipe_names()
    width = max(len(name) for name in (*names, *for_eval))
    for each in names:
        print(f"{each:<{width}}  {load_recipe(each).description}")
    print("", "For dgpo-fast eval RUN_DIR --recipe NAME:", sep="\n")
    for each in for_eval:
        print(f"{each:<{width}}  {load_evaluation_recipe(each)['description']}")


@app.command()
def rewards() -> None:
    """List the rewards that come with the package, and what each still lacks on this machine (takes some seconds)."""
    from dgpo_fast.rewards.listing import as_table

    Console().print(as_table())


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show the machine, the versions, and which attention and which implementation of each operator serve here."""
    from dgpo_fast.doctor import examine, render

    findings = examine()
    if as_json:
        print(json.dumps(findings, indent=2))
    else:
        Console().print(render(findings))


@app.command("serve-reward")
def serve_reward(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="As recipes name it: built in, or package.module:Class of your own.")
    ],
    host: Annotated[
        str,
        typer.Option(metavar="HOST", help="Where to listen; beyond this machine only with $DGPO_FAST_REWARD_TOKEN."),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="PORT", min=0, max=65535, help="0 takes any that is free.")] = 8000,
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Whose settings of the reward to take; else the defaults.")
    ] = None,
    overrides: RewardOverrides = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:1.")] = "auto",
    max_images: Annotated[int, typer.Option(metavar="N", min=1, help="Of a request.")] = 64,
    max_megabytes: Annotated[int, typer.Option(metavar="MB", min=1, help="Of a request.")] = 256,
) -> None:
    """Serve a reward to runs that name its address in rewards.running, until SIGINT or SIGTERM."""
    settings = load_recipe(recipe, overrides or []).rewards if recipe else load_rewards(name, overrides or [])
    from dgpo_fast.rewards import server

    server.serve_reward(
        name, settings, device=server.parse_device(device), host=host, port=port, max_images=max_images,
        max_bytes=max_megabytes * 1_000_000,
    )  # fmt: skip


@app.command()
def profile(
    recipe: Recipe,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where stages.csv, collectives.csv and trace.json go.")],
    iterations: Annotated[int, typer.Option(metavar="N", min=1, help="Iterations to measure.")] = 3,
    warmup: Annotated[int, typer.Option(metavar="N", min=0, help="Iterations before them.")] = 1,
    trace: Annotated[bool, typer.Option(help="Write trace.json; not under Nsight.")] = True,
    overrides: Overrides = None,
    model: Model = None,
) -> None:
    """Measure where the time of an iteration goes and, with several ranks, what they exchange."""
    config = load_recipe(recipe, [*(overrides or []), *_as_overrides({"model.name": model})])
    _check_writable(out)
    from dgpo_fast.profile_run import nsight_commands, profile_run, render

    measured = profile_run(config, out, iterations=iterations, warmup=warmup, trace=trace)
    if not launcher.is_first():
        return
    Console().print(render(measured))
    for path in measured.files:
        print(path)
    # Not through rich, which would break the lines that are to be copied.
    print("", "With Nsight:", *nsight_commands(out), sep="\n")


@tiny.command("build")
def tiny_build(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the pipeline goes.")],
    seed: Annotated[int, typer.Option(metavar="S", min=0)] = 0,
) -> None:
    """Train the embedded pipeline from nothing (an hour on two CPU cores)."""
    _check_writable(out)
    from rich.progress import Progress, TaskID

    from dgpo_fast.models.tiny.build import BuildOptions, build

    with Progress(console=Console(stderr=True)) as progress:
        tasks: dict[str, TaskID] = {}

        def report(stage: str, step: int, num_steps: int, loss: float) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=num_steps)
            progress.update(tasks[stage], completed=step, description=f"{stage} loss {loss:.4f}")

        record = build(out, BuildOptions(seed=seed), report)
    print(f"{out}: trained in {record['duration_s']} s")


@app.command()
def report(run_dir: RunDirectory) -> None:
    """Write report.html of a run again."""
    from dgpo_fast.report import write_report

    print(write_report(run_dir))


def _as_overrides(settings: dict[str, int | str | None]) -> list[str]:
    # Values as JSON, which is YAML too: a model name such as "3.5" stays a string.
    return [f"{key}={json.dumps(value)}" for key, value in settings.items() if value is not None]


def _run_directory_to_write(out: Path | None, config: Config, *, resume: bool) -> Path:
    """`out` or a new name, once it is sure that a run can be written there and none is overwritten."""
    alone = launcher.world_size() == 1
    if out is None:
        if resume:
            raise UserError("--resume needs --out RUN_DIR, the run to go on with")
        if not alone:
            raise UserError("several processes need --out RUN_DIR: each would pick a name of its own")
        out = Path("runs") / f"{config.name}-{datetime.now():%Y%m%d-%H%M%S}"
    # The first of several ranks refuses when the others hear of it: before they have met, they would wait for it.
    if alone and not resume:
        refuse_used(out)
        _check_writable(out)
        _check_takes_links(out)
    return out


def _check_writable(directory: Path) -> None:
    """Makes `directory` if need be, and writes a file there that vanishes at once."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}") from None


def _check_takes_links(directory: Path) -> None:
    """Makes a symbolic link in `directory` that vanishes at once."""
    with tempfile.TemporaryDirectory(dir=directory) as probe:
        try:
            (Path(probe) / "best").symlink_to("elsewhere")
        except OSError as error:
            raise UserError(
                f"{directory} takes no symbolic links ({error.strerror}), and checkpoints/best of a run is one: "
                "give --out on another file system"
            ) from None


def _check_file(option: str, file: Path | None, *, example: str) -> None:
    """Makes sure that a file, if one is asked for, can be written."""
    if file is None:
        return
    if file.is_dir():
        raise UserError(f"{option} {file} is a directory; expected a file such as {file / example}")
    _check_writable(file.parent)


@contextmanager
def _out_of_memory_said(config: Config, *, is_training: bool) -> Iterator[None]:
    """Says what needs less of a GPU's memory, where it does not suffice."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).split(". ")[:3]).rstrip(".")  # later ones advise on PyTorch's allocator
        rewards = "rewards elsewhere (rewards.running.NAME.device=cpu, or url)"
        raise UserError(f"{reason}. Less is needed with {_remedies(config, is_training)}, or {rewards}") from error


def _remedies(config: Config, is_training: bool) -> str:
    if not is_training:
        return "--set rollout.images_per_forward=N, or rollout.images_per_decode=N, smaller than the run's"
    batches = "a smaller optimizer.images_per_micro_batch or rollout.images_per_forward"
    less = [] if config.model.checkpointing == "full" else ["model.checkpointing=full"]
    if config.adapter is None:
        less += _sharded_further(config)
    if not config.algorithm.depends_on_batches:
        less.append(batches)
    less.append("a smaller rollout.images_per_decode")
    goes_on = "with which --resume goes on"
    if config.algorithm.depends_on_batches:
        goes_on += f", or, in a new run, {batches}"
    return f"{', or '.join(less)}, {goes_on} (--dry-run foresees it)"


def _sharded_further(config: Config) -> Iterator[str]:
    """What of `parallel` the configuration still has to offer."""
    parallel, stage = config.parallel, config.parallel.zero_stage
    if stage == 0:
        yield "parallel.zero_stage=1 on several ranks or with parallel.offload_optimizer=cpu"
        return
    yield "more ranks"
    if stage < 3 and _is_valid(config, f"parallel.zero_stage={stage + 1}"):
        yield f"parallel.zero_stage={stage + 1}"
    if parallel.offload_optimizer == "none":
        yield "parallel.offload_optimizer=cpu"
    if stage == 3 and parallel.frozen == "replicas" and not config.rollout.cuda_graphs:
        yield "parallel.frozen=sharded"
    if stage == 3 and parallel.offload_weights == "none":
        yield "parallel.offload_weights=cpu"


def _is_valid(config: Config, override: str) -> bool:
    try:
        change_config(config, {}, [override], source="")
    except UserError:
        return False
    return True


def _print_outcome(out: Path) -> None:
    from dgpo_fast.metrics import read_evaluations

    last = read_evaluations(out)[-1]
    title = f"{last['num_prompts']} held-out prompts, step {last['step']}"
    console = Console()
    console.print(_score_table(title, base=last["base"], tuned=last["tuned"]))
    console.print(f"report: {out / 'report.html'}", soft_wrap=True, highlight=False)


def _score_table(title: str, *, base: dict[str, float], tuned: dict[str, float]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    for column in ("base", "tuned", "change"):
        table.add_column(column, justify="right")
    for metric, before in base.items():
        after = tuned[metric]
        table.add_row(escape(metric), f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    return table


def _quiet_libraries() -> None:
    """Keeps what libraries say at import and while loading off the terminal; their errors still show."""
    for variable in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    # DeepSpeed sets its logger's level when it is imported, and has it write to stdout: only a filter outlasts that.
    logging.getLogger("DeepSpeed").addFilter(_is_error)
    warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)})(\.|$)")


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _refuse(message: str) -> NoReturn:
    failures.fail(message)
    Console(stderr=True).print(f"error: {' '.join(message.split())}", markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(USER_ERROR)
