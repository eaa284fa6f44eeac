"""Compositions of `conf/` that a process of the suite has made already, for the same overrides once more."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from igpt.run.arguments import complete_overrides
from igpt.utils.program import find_conf


def check_overrides(overrides: list[str], folders: list[Path]) -> DictConfig:
    """The resolved config of these overrides. Raises ValueError as `complete_overrides`."""
    return complete_overrides(overrides, folders)[1]


@contextmanager
def kept_compositions() -> Iterator[None]:
    """While it lasts, equal overrides of igpt's own `conf/` are composed once, and copied from then on.

    A run composes the same overrides up to three times, and each stage of a pipeline its task's. Compositions of other
    folders, whose files tests change, and of sweeps are not kept; nor are errors. Equal YAML is parsed once.
    """
    kept: dict[tuple[Any, ...], bytes] = {}
    compose = ConfigLoaderImpl._load_configuration_impl
    own = find_conf().resolve()

    def compose_once(
        self: ConfigLoaderImpl, config_name: str | None, overrides: list[str], run_mode: RunMode, **more: Any
    ) -> DictConfig:
        places = tuple((each.provider, each.path) for each in self.config_search_path.get_path())
        folders = [str(path) for provider, path in places if provider not in ("hydra", "schema")]
        is_own = [os.path.realpath(folder.removeprefix("file://")) for folder in folders] == [str(own)]
        if not is_own or run_mode != RunMode.RUN or any("searchpath" in override for override in overrides):
            return compose(self, config_name, overrides, run_mode, **more)
        key = (config_name, *overrides, places, *more.items())
        if key not in kept:
            kept[key] = pickle.dumps(compose(self, config_name, overrides, run_mode, **more))
        cfg: DictConfig = pickle.loads(kept[key])
        cfg.hydra.runtime.cwd = os.getcwd()  # the only part that the overrides do not decide
        return cfg

    texts: dict[str, bytes] = {}
    load = OmegaConf.load

    def load_once(file: Any) -> Any:
        if not hasattr(file, "seek"):  # a path
            return load(file)
        text = file.read()
        if text not in texts:
            file.seek(0)
            texts[text] = pickle.dumps(load(file))
        return pickle.loads(texts[text])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", staticmethod(load_once))
        patch.setattr(ConfigLoaderImpl, "_load_configuration_impl", compose_once)
        yield
