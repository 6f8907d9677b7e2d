"""The rewards that come with the package, and what each still lacks on this machine: what `dgpo-fast rewards` shows."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from dgpo_fast.errors import UserError
from dgpo_fast.reward_config import JudgeConfig, RewardConfig, RewardsConfig
from dgpo_fast.rewards.base import BUILT_IN, absent_weights, has_weights, load_reward

READY = "ready"


def as_table() -> Table:
    """A row for each, for a terminal of 80 columns or more, where the name of every repository stays whole."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("reward, and what higher means", max_width=30)
    table.add_column("on this machine", overflow="fold")
    for name, built_in in BUILT_IN.items():
        on_this_machine = escape("\n".join(lacking(name))) or READY
        table.add_row(f"[bold]{name}[/bold]\n[dim]{built_in.about}[/dim]", on_this_machine, end_section=True)
    return table


def lacking(name: str) -> Iterator[str]:
    """What a reward of the package needs with its default settings and has not, a line each."""
    settings = RewardsConfig(terms=(RewardConfig(name=name),))
    section = getattr(settings, name, None)
    if isinstance(section, JudgeConfig):
        yield f"needs {section.key}.url and .model: an OpenAI-compatible server"
        return
    try:
        if has_weights(name):
            yield from (f"will download {weights.about}" for weights, _ in absent_weights(name, settings))
        else:
            load_reward(name, settings)
    except UserError as error:
        yield str(error).removeprefix("rewards: ")
