"""Pavlov's one door: the command line.

Every command takes a TOML file and dotted overrides (`rl.num_steps=5`). Everything is imported
when it is needed, so that `--help` and a wrong key answer at once.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    name="pavlov",
    help="Turns a language model into an assistant by reinforcement learning from human feedback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Config = Annotated[Path, typer.Argument(help="TOML file", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="dotted overrides, e.g. seed=1", metavar="[KEY=VALUE]...")
]
Resume = Annotated[bool, typer.Option("--resume", help="go on where an earlier attempt ended")]
AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]


@app.command(epilog="Example: pavlov doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """What this machine has and lacks."""
    from cluster.doctor import examine

    findings = examine()
    if as_json:
        _print_json(findings)
    else:
        for key, value in findings.items():
            if key not in ("ok", "problems", "versions"):
                print(f"{key:22} {value}")
        print(f"{'versions':22} " + ", ".join(f"{k} {v}" for k, v in findings["versions"].items()))
        for problem in findings["problems"]:
            print(f"problem: {problem}")
        print("ready" if findings["ok"] else "not ready")
    raise typer.Exit(0 if findings["ok"] else 1)


@app.command(epilog="Example: pavlov demo --out runs/demo")
def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="folder for all results")] = Path("runs/demo"),
    config: Annotated[
        Path | None, typer.Option(help="TOML file; default configs/demo.toml")
    ] = None,
) -> None:
    """The whole pipeline on the embedded model: compare, train reward and policy, judge."""
    from rlhf.config import DemoConfig, load_config
    from trainers.demo import run_demo

    path = config or Path(__file__).resolve().parent / "configs" / "demo.toml"
    run_demo(load_config(DemoConfig, path, overrides or []), out, _console())


@app.command(epilog="Example: pavlov reward configs/reward_hh_cpu.toml data.limit=600")
def reward(config: Config, overrides: Overrides = None) -> None:
    """Train the reward-model ensemble from preference pairs."""
    from rlhf.config import RewardConfig, load_config

    settings = load_config(RewardConfig, config, overrides or [])
    from trainers.reward import run_reward

    run_reward(settings, config, _console())


@app.command(epilog="Example: pavlov score --reward reward_hh_cpu --data pairs.jsonl --json")
def score(
    reward: Annotated[str, typer.Option(help="reward-model folder, or a run's")],
    data: Annotated[Path, typer.Option(help="pairs or single completions")],
    criterion: Annotated[
        str | None, typer.Option(help="score by this criterion's heads, not by the reward")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="a row for each input row, as Parquet")] = None,
    as_json: AsJson = False,
) -> None:
    """Score pairs or single completions: accuracy, calibration, disagreement."""
    from rlhf.config import data_path
    from trainers.score import run_score

    file = data if data.is_file() else data_path(str(data))
    # Where an actor dies Ray says so on stdout, which is for the JSON object alone.
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        summary = run_score(reward, file, out, _console(to_stderr=as_json), criterion)
    if as_json:
        _print_json(summary)
    else:
        for key, value in summary.items():
            print(f"{key:16} {json.dumps(value)}")


@app.command(epilog="Example: pavlov sft configs/sft_hh_cpu.toml data.limit=400")
def sft(
    config: Config,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Supervised fine-tuning, stopped by the reward of what the model says."""
    from rlhf.config import SFTConfig, load_config

    settings = load_config(SFTConfig, config, overrides or [])
    from trainers.sft import run_sft

    folder = run_sft(settings, config, _console(), resume=resume)
    print(f"done: {folder / 'policy'}")


@app.command(epilog="Example: pavlov tune configs/tune_hh_cpu.toml tune.trials=4")
def tune(
    config: Config,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """The settings of fine-tuning, chosen by reward."""
    from rlhf.config import TuneConfig, load_config

    settings = load_config(TuneConfig, config, overrides or [])
    from trainers.tune import run_tune

    folder = run_tune(settings, config, _console(), resume=resume)
    print(f"done: {folder / 'policy'}")


@app.command(epilog="Example: pavlov rl configs/rl_hh_cpu.toml rl.num_steps=3")
def rl(
    config: Config,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Reinforcement learning against a reward model."""
    from rlhf.config import RLConfig, load_config

    settings = load_config(RLConfig, config, overrides or [])
    from trainers.rl import run_rl

    folder = run_rl(settings, config, _console(), resume=resume)
    print(f"done: {folder / 'policy'}")


def _console(*, to_stderr: bool = False) -> Console:
    from rich.console import Console

    # No markup: what is printed may quote data and file names.
    return Console(stderr=to_stderr, highlight=False, soft_wrap=True, markup=False)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value))


def _on_sigterm(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


def main() -> None:
    """Run a command. A mistake of the user's is one sentence on stderr and exit code 2."""
    from rlhf.errors import PavlovError

    # The progress bars are ours; the libraries' own say nothing that a user can act on.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: "Setting accelerator to CPU" not in record.getMessage()
    )
    signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        app()
    except PavlovError as error:
        print(f"pavlov: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"pavlov: {error.filename}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("pavlov: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
