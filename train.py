"""The only entry point: `python train.py --help`."""

import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

CONF = Path(__file__).parent / "conf"
ASKED = sys.argv[1:]
INTERRUPTED = 130  # exit code after Ctrl-C, as in shells


def main(cfg: Any) -> None:
    """Runs the composed config (a DictConfig), in this process or in several."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from igpt.distributed import launcher
    from igpt.run.early_checks import check_early

    try:
        check_early(cfg)
        n_process = 1 if launcher.is_rank() else launcher.count_devices(cfg.trainer)
    except ValueError as error:
        refuse(error)
    if not launcher.is_rank():
        print(f"{cfg.task.name}: loading PyTorch and Lightning", file=sys.stderr, flush=True)
    if n_process > 1:
        hydra_cfg = HydraConfig.get()  # of a sweep's job in this process, the arguments are Hydra's
        arguments = hydra_cfg.overrides.task if hydra_cfg.mode == RunMode.MULTIRUN else ASKED
        if code := launcher.run_ranks([sys.executable, __file__, *arguments], n_process):
            sys.exit(code)
        return
    from igpt.run.launch import main as run  # slow imports, after Hydra has composed the config

    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(cfg)


def refuse(error: ValueError) -> NoReturn:
    """Exits with code 2 after a one-line error."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))  # during the imports: Ctrl-C without a traceback
    import hydra

    from igpt.distributed import launcher
    from igpt.run.arguments import prepare_arguments

    launcher.die_with_parent()
    try:
        sys.argv[1:] = prepare_arguments(sys.argv[1:], CONF)
    except ValueError as error:
        refuse(error)
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(main)()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(launcher.sweep_code)
