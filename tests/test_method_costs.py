"""What an image costs each method: the shapes that are measured, and what is written down."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.method_costs import PUBLISHED, WITHOUT_WEIGHTS, measure, shortened, write  # noqa: E402
from benchmarks.speedup_runs import METHODS  # noqa: E402
from dgpo_fast.config import load_recipe  # noqa: E402
from dgpo_fast.planning import plan  # noqa: E402


@pytest.mark.parametrize("name", METHODS)
def test_a_shortened_recipe_does_the_same_for_an_image(name: str) -> None:
    """Fewer groups in the same micro-batches: FLOPs of an image are the recipe's."""
    recipe = load_recipe(PUBLISHED[name], WITHOUT_WEIGHTS)
    short = shortened(PUBLISHED[name], WITHOUT_WEIGHTS)
    assert short.model_copy(update={"groups": recipe.groups}) == recipe
    assert short.images_per_iteration <= recipe.images_per_iteration
    costs = [plan(config, num_ranks=1).cost for config in (recipe, short)]
    per_image = [
        cost.flops / config.images_per_iteration
        for config, cost in zip((recipe, short), costs, strict=True)
        if cost is not None
    ]
    assert per_image[0] == pytest.approx(per_image[1], rel=1e-9)


def test_a_cost_is_measured_and_written(tmp_path: Path, quick: tuple[str, ...]) -> None:
    cost = measure("dgpo", "tiny-dgpo", [*quick, "groups.per_iteration=4"], iterations=1)
    assert (cost.images_of_recipe, cost.images) == (16, 4)
    assert cost.seconds_per_image > 0
    assert cost.tflops_per_s == pytest.approx(cost.tflop_per_image / cost.seconds_per_image)
    write([cost], tmp_path / "new" / "method_costs.csv")
    (row,) = csv.DictReader((tmp_path / "new" / "method_costs.csv").open())
    assert (row["method"], row["recipe"], row["images"]) == ("DGPO", "tiny-dgpo", "4")
    assert float(row["tflop_per_image"]) == pytest.approx(cost.tflop_per_image, rel=1e-4)
