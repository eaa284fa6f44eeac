"""Objectives by name, for configs and checkpoints; a file holds a name and numbers, never code."""

from collections.abc import Callable
from typing import Any

from igpt.objective.ar import AR
from igpt.objective.base import Objective
from igpt.objective.bert import BERT
from igpt.settings.fields import parse_arguments

OBJECTIVES: dict[str, Callable[..., Objective]] = {"ar": AR, "bert": BERT}


def build_objective(*, name: Any = None, **settings: Any) -> Objective:
    """The objective of that name. Raises ValueError on an unknown name or setting."""
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise ValueError(f"objective.name must be one of {', '.join(sorted(OBJECTIVES))}, got {name!r}")
    return OBJECTIVES[name](**parse_arguments(OBJECTIVES[name], settings, "objective"))
