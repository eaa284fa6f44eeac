"""The command `igpt`, which `train.py` also is."""

import os
import signal
import sys
from typing import Any, NoReturn

ASKED = sys.argv[1:]
INTERRUPTED = 130  # exit code after Ctrl-C, as in shells
COMPLETION = ("-sc", "--shell-completion")


def main() -> None:
    """Runs the command line of this process."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))  # during the imports: Ctrl-C without a traceback
    from igpt.utils import program

    if "--version" in ASKED:
        print(program.describe_versions())
        return
    import hydra

    from igpt.distributed import launcher
    from igpt.run.arguments import prepare_arguments

    launcher.die_with_parent()
    launcher.skip_teardown()
    conf = program.find_conf()
    try:
        if ASKED[:1] and ASKED[0] in COMPLETION:
            from igpt.run import completion

            print(completion.answer(ASKED[1:], conf))
            return
        sys.argv[1:] = prepare_arguments(ASKED, conf)
    except ValueError as error:
        refuse(error)
    try:
        hydra.main(version_base="1.3", config_path=str(conf), config_name="config")(run)()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    launcher.rank_finished = launcher.is_rank() and launcher.sweep_code == 0
    sys.exit(launcher.sweep_code)


def run(cfg: Any) -> None:
    """Runs the composed config (a DictConfig), in this process or in several."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from igpt.distributed import launcher
    from igpt.run.early_checks import check_early
    from igpt.utils.program import program_arguments

    try:
        check_early(cfg, HydraConfig.get().runtime.choices)
        n_process = 1 if launcher.is_rank() else launcher.count_devices(cfg.trainer)
    except ValueError as error:
        refuse(error)
    if not launcher.is_rank():
        print(f"{cfg.task.name}: loading PyTorch and Lightning", file=sys.stderr, flush=True)
    if n_process > 1:
        hydra_cfg = HydraConfig.get()  # of a sweep's job in this process, the arguments are Hydra's
        arguments = hydra_cfg.overrides.task if hydra_cfg.mode == RunMode.MULTIRUN else ASKED
        if code := launcher.run_ranks([*program_arguments(), *arguments], n_process):
            sys.exit(code)
        return
    from igpt.run import launch  # slow imports, after Hydra has composed the config

    signal.signal(signal.SIGINT, signal.default_int_handler)
    launch.main(cfg)


def refuse(error: ValueError) -> NoReturn:
    """Exits with code 2 after a one-line error."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
