"""Objectives by name, for configs and checkpoints; a file holds a name and numbers, never code."""

from collections.abc import Callable
from typing import Any

from igpt.objective.ar import AR
from igpt.objective.base import Objective
from igpt.objective.bert import BERT
from igpt.settings.fields import parse_arguments

OBJECTIVES: dict[str, Callable[..., Objective]] = {"ar": AR, "bert": BERT}


def build_objective(*, name: str, **settings: Any) -> Objective:
    """The objective of that name. Raises ValueError on an unknown name or setting."""
    if name not in OBJECTIVES:
        raise ValueError(f"no objective called {name!r}; there are {', '.join(sorted(OBJECTIVES))}")
    return OBJECTIVES[name](**parse_arguments(OBJECTIVES[name], settings, "objective"))
