"""What the runs of benchmarks/speedup.py say: tables and sentences of pages in docs/ and of README.md, and pictures.

    python -m benchmarks.speedup_report [DIR | --write]

Methods are compared by as many runs of each, at the settings with which they are fastest, and at those that keep the
highest scores: speedup_tables.py says how, speedup_words.py in words.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import claim_history, judge_noise
from benchmarks.pages import filled
from benchmarks.speedup_chart import Curve, draw
from benchmarks.speedup_costs import AGAIN, read_costs, read_engines
from benchmarks.speedup_results import RESULTS, Result, ablated, fastest, queue, results, steadiest
from benchmarks.speedup_runs import ABLATIONS, COMPARED, HORIZON_S, METHODS, OURS, SWEEP_S
from benchmarks.speedup_tables import (
    compared,
    table_of_ablations,
    table_of_answers,
    table_of_engine,
    table_of_factors,
    table_of_quality,
    table_of_sweep,
    table_of_targets,
    table_of_what_is_kept,
)
from benchmarks.speedup_words import load, sentences
from benchmarks.tables import stamp

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, PROTOCOL, README = DOCS / "benchmarks.md", DOCS / "benchmark-protocol.md", DOCS.parent / "README.md"
PAIRWISE = "diffusion-dpo"


def tables(directory: Path = RESULTS) -> dict[Path, dict[str, str]]:
    """What each page shows, by name."""
    runs, chosen = queue(directory), shown(directory)
    rows = compared(*chosen)
    seeds, swept = results(runs.finals, directory), results(runs.sweep, directory)
    of_finals = [*_all(seeds), *_all(results(runs.steady, directory))]
    begun = {name: [result.until(SWEEP_S) for result in of_seeds] for name, of_seeds in seeds.items()}
    changed, measured = ablated(runs.ablations, directory), read_engines(directory)
    page = {
        "answers": table_of_answers(chosen.fast, chosen.steady, COMPARED),
        "targets": table_of_targets(rows),
        "factors": table_of_factors(
            rows, COMPARED, known=read_costs(directory), again=read_costs(directory, AGAIN)
        ),
        "engine": table_of_engine(rows, COMPARED, measured),
        "ablations": table_of_ablations(
            {"DGPO, as chosen": begun[OURS]}
            | {ablation.title: changed[name] for name, ablation in ABLATIONS.items()}
            | {f"{METHODS[PAIRWISE].title}, as chosen": begun[PAIRWISE]}
        ),
        "kept": table_of_what_is_kept(chosen.fast, chosen.steady),
        "quality": table_of_quality(rows, COMPARED),
        **sentences(rows, chosen.steady, changed, measured),
    }  # fmt: skip
    protocol = {
        "load": load(of_finals, _all(swept), _all(changed)),
        "noise": judge_noise.sentence(judge_noise.read(directory)),
        "sweep": table_of_sweep(swept),
    }
    return {PAGE: page, PROTOCOL: protocol, README: {name: page[name] for name in ("answers", "headline")}}


def claims(directory: Path, /, **origin: str) -> list[claim_history.Claim]:
    """What the pages say of each method's settings."""
    return claim_history.claims(compared(*shown(directory)), COMPARED, **origin)


def _all(found: Mapping[str, Sequence[Result]]) -> list[Result]:
    return [result for of_name in found.values() for result in of_name]


class Shown(NamedTuple):
    """The runs that methods are shown by, from every seed, or, until there are any, the sweep's."""

    fast: dict[str, list[Result]]
    steady: dict[str, list[Result]]


def shown(directory: Path) -> Shown:
    """Of each method those of the setting that is fastest, and those of the steadiest."""
    runs = queue(directory)
    swept = {name: found for name, found in _alike(results(runs.sweep, directory)).items() if found}
    fast, steady = (_seeds(results(of_setting, directory)) for of_setting in (runs.finals, runs.steady))
    return Shown(
        fast={name: fast[name] or [fastest(found)] for name, found in swept.items()},
        steady={name: steady[name] or [steadiest(found)] for name, found in swept.items()},
    )


def _alike(found: Mapping[str, Sequence[Result]]) -> dict[str, list[Result]]:
    """As many runs of each method as of the one that has fewest: while some are to come, nobody has had more tries."""
    fewest = min(len(of_method) for of_method in found.values())
    return {name: [*of_method[:fewest]] for name, of_method in found.items()}


def _seeds(found: Mapping[str, Sequence[Result]]) -> dict[str, list[Result]]:
    """As many of each method, and an odd number, which has a median."""
    return {name: of_method[: len(of_method) - 1 + len(of_method) % 2] for name, of_method in _alike(found).items()}


AXES = {"seconds": "seconds of training, one core", "images": "images", "flops": "FLOPs"}
"""What scores are drawn over."""


def pictures(directory: Path = RESULTS) -> dict[str, str]:
    """Strict scores of the runs that methods are shown by, over each of `AXES`, as long as all of them last."""
    chosen = {
        name: [result.until(HORIZON_S) for result in of_seeds] for name, of_seeds in shown(directory).fast.items()
    }
    return {
        against: draw(
            [
                Curve(
                    title=METHODS[name].title,
                    places=tuple(float(getattr(point, against)) for point in result.points),
                    values=tuple(point.strict for point in result.points),
                )
                for name, of_seeds in chosen.items()
                for result in of_seeds
            ],
            across=across,
            up="exact images of held-out prompts",
            target=COMPARED,
        )
        for against, across in AXES.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", nargs="?", type=Path, default=RESULTS, metavar="DIR", help="results to show tables of"
    )
    parser.add_argument("--write", action="store_true", help="put tables and pictures of the CPU's into docs/")
    options = parser.parse_args()
    if options.write:
        for page, found in tables().items():
            page.write_text(filled(page.read_text(encoding="utf-8"), found), encoding="utf-8")
        for against, picture in pictures().items():
            (DOCS / f"speedup-{against}.svg").write_text(picture, encoding="utf-8")
        history = claim_history.added(claim_history.read(), claims(RESULTS, **stamp()))
        claim_history.write(history)
        claim_history.PICTURE.write_text(claim_history.picture(history), encoding="utf-8")
        return
    for page, found in tables(options.results).items():
        for name, table in found.items():
            print(f"{page.name}: {name}\n{table}\n")


if __name__ == "__main__":
    main()
