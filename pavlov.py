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
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from rlhf.config import LabelConfig

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
    out: Annotated[
        Path | None, typer.Option(help="a row for each row that could be scored, as Parquet")
    ] = None,
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


@app.command(epilog="Example: pavlov serve configs/serve.toml policy.model=demo/rl/policy")
def serve(config: Config, overrides: Overrides = None) -> None:
    """The assistant over HTTP: OpenAI's chat interface, best-of-N by the ensemble."""
    from rlhf.config import ServeConfig, load_config

    settings = load_config(ServeConfig, config, overrides or [])
    from serving.chat_server import serve_chat

    serve_chat(settings, _console())


@app.command(
    epilog="Example: pavlov compare runs/rl_hh_cpu embedded --prompts "
    "hh/helpful-base/validation.jsonl.gz --out pairs.jsonl"
)
def compare(
    one: Annotated[str, typer.Argument(help="run or model folder, hub id, or embedded")],
    other: Annotated[str, typer.Argument(help="what it is compared with")],
    prompts: Annotated[Path, typer.Option(help="whose prompts are answered, once by either")],
    out: Annotated[Path, typer.Option(help="*.jsonl for `pavlov label import --pairs`")],
    limit: Annotated[int, typer.Option(min=1, help="prompts at most")] = 100,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens of an answer")] = 256,
    max_prompt_tokens: Annotated[
        int, typer.Option(min=1, help="longer prompts are left out")
    ] = 512,
    seed: Annotated[int, typer.Option(help="of both policies' answers")] = 0,
) -> None:
    """Have two policies answer the same prompts, for judges to compare directly."""
    from trainers.compare import write_pairs

    write_pairs(
        (one, other),
        prompts,
        out,
        _console(),
        limit=limit,
        max_tokens=max_tokens,
        max_prompt_tokens=max_prompt_tokens,
        seed=seed,
    )


@app.command(epilog="Example: pavlov promote runs/rl_hh_cpu --project release-2")
def promote(
    context: typer.Context,
    run: Annotated[str | None, typer.Argument(help="run or model folder", metavar="[RUN]")] = None,
    overrides: Overrides = None,
    project: Annotated[
        str | None, typer.Option(help="where it was compared with what is served", metavar="NAME")
    ] = None,
    kind: Annotated[Literal["person", "model"], typer.Option(help="of judge")] = "person",
    labels: Annotated[Path, typer.Option(help="configuration of `pavlov label`")] = Path(
        "configs/label.toml"
    ),
    name: Annotated[str, typer.Option(help="the server's serve.name")] = "pavlov",
    without_evidence: Annotated[
        str | None, typer.Option(help="promote it all the same; kept in the record", metavar="WHY")
    ] = None,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="serve again what was served before")
    ] = False,
    wait: Annotated[float, typer.Option(min=0, help="seconds for the server to follow")] = 180.0,
) -> None:
    """Make a run's policy the served one, upon evidence of independent judges."""
    from rlhf.errors import ConfigError
    from serving.promotion import promote as promote_run
    from serving.promotion import roll_back, wait_until_followed

    if rollback == (run is not None):
        raise ConfigError("give RUN to promote it, or --rollback alone to undo the last promotion")
    if rollback:
        _refuse_unread(context, "with --rollback", "project", "kind", "labels", "without_evidence")
    if project is None:
        _refuse_unread(context, "without --project", "kind", "labels")
    if overrides and project is None:
        raise ConfigError(
            f"{overrides[0]} sets the configuration of the labels, which only --project reads"
        )
    if run is None:
        done = roll_back(name)
    else:
        settings = _label_config(labels, overrides) if project is not None else None
        done = promote_run(run, name, settings, project, kind=kind, override=without_evidence)
        if done.evidence is not None:
            print(done.evidence["sentence"])
    print(f"version {done.version} is to be served, not {done.before}")
    if wait_until_followed(name, done, wait):
        print(f"version {done.version} is served")
    else:
        print("no server has followed so far; one that starts will")


label = typer.Typer(help="Human judgement: what to compare, who compares it, what came of it.")
app.add_typer(label, name="label", no_args_is_help=True)
ProjectName = Annotated[str, typer.Option("--project", help="whose work it is", metavar="NAME")]
Kind = Annotated[Literal["person", "simulated", "model"], typer.Option(help="of assessor")]
Criterion = Annotated[str, typer.Option(help="helpful, honest, … or overall", metavar="NAME")]
_EXAMPLE, _OF = "Example: pavlov label", "configs/label.toml --project x"


@label.command("import", epilog=f"{_EXAMPLE} import {_OF} --pairs p.jsonl")
def label_import(
    context: typer.Context,
    config: Config,
    project: ProjectName,
    overrides: Overrides = None,
    pairs: Annotated[Path | None, typer.Option(help="pairs to judge")] = None,
    honeypots: Annotated[
        bool, typer.Option("--honeypots", help="pairs whose better answer is known test assessors")
    ] = False,
    flagged: Annotated[
        Path | None, typer.Option(help="a run of `pavlov rl`: what its ensemble did not know")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="at most so many flagged pairs")] = None,
    judgements: Annotated[Path | None, typer.Option(help="verdicts given elsewhere")] = None,
    form: Annotated[
        Literal["pavlov", "mt-bench", "label-studio"],
        typer.Option("--format", help="of the verdicts"),
    ] = "pavlov",
) -> None:
    """Take in pairs to judge, what training has flagged, or verdicts given elsewhere."""
    settings = _label_config(config, overrides)
    from rlhf.errors import ConfigError
    from serving.label_commands import import_flagged, import_judgements, import_work

    if sum(given is not None for given in (pairs, flagged, judgements)) != 1:
        raise ConfigError("give --pairs FILE, --flagged RUN, or --judgements FILE and --format")
    if flagged is not None:
        _refuse_unread(context, "with --flagged", "honeypots", "form")
        import_flagged(settings, project, flagged, limit, _console())
    if pairs is not None:
        _refuse_unread(context, "with --pairs", "limit", "form")
        import_work(settings, project, pairs, _console(), honeypots=honeypots)
    if judgements is not None:
        _refuse_unread(context, "with --judgements", "honeypots", "limit")
        import_judgements(settings, project, judgements, form, _console())


@label.command("invite", epilog=f"{_EXAMPLE} invite {_OF} --name ann")
def label_invite(
    context: typer.Context,
    config: Config,
    project: ProjectName,
    name: Annotated[str, typer.Option(help="the assessor's name in the project")],
    overrides: Overrides = None,
    role: Annotated[
        Literal["assessor", "expert", "owner"],
        typer.Option(help="experts write honeypots too, owners see everybody's figures too"),
    ] = "assessor",
    kind: Kind = "person",
    again: Annotated[
        bool, typer.Option("--again", help="a new token for one who is there; the old one is void")
    ] = False,
) -> None:
    """A new assessor: prints the token that signs them in, once."""
    settings = _label_config(config, overrides)
    from serving.label_commands import invite

    if again:
        _refuse_unread(context, "with --again", "role", "kind")
    print(invite(settings, project, name, kind, role, again=again))


@label.command("serve", epilog=f"{_EXAMPLE} serve configs/label.toml label.port=0")
def label_serve(
    config: Config,
    overrides: Overrides = None,
    project: Annotated[
        str | None, typer.Option(help="let this project's assessors in alone", metavar="NAME")
    ] = None,
) -> None:
    """The page on which assessors judge, until SIGTERM or SIGINT."""
    settings = _label_config(config, overrides)
    from serving.label_server import serve_labels

    serve_labels(settings, _console(), project)


@label.command(
    "judge",
    epilog=f"{_EXAMPLE} judge {_OF} simulated.assessors=3",
)
def label_judge(
    context: typer.Context,
    config: Config,
    project: ProjectName,
    overrides: Overrides = None,
    url: Annotated[str | None, typer.Option(help="of the service; default: as configured")] = None,
    reward: Annotated[
        str | None, typer.Option(help="judge by this reward model; default: simulated assessors")
    ] = None,
    truth: Annotated[
        list[Path] | None, typer.Option(help="pairs whose better answer is the simulated truth")
    ] = None,
) -> None:
    """Judges that are no people, over the service's HTTP interface; never counted as people."""
    settings = _label_config(config, overrides)
    from serving.label_commands import judge

    if reward is not None:
        _refuse_unread(context, "with --reward", "truth")
    judge(settings, project, url, _console(), reward=reward, truth=truth or [])


@label.command(
    "export",
    epilog=f"{_EXAMPLE} export {_OF} --out pairs.parquet",
)
def label_export(
    context: typer.Context,
    config: Config,
    project: ProjectName,
    out: Annotated[Path, typer.Option(help="*.parquet; judgements also *.jsonl, *.json")],
    overrides: Overrides = None,
    judgements: Annotated[
        bool, typer.Option("--judgements", help="the verdicts themselves, not labels made of them")
    ] = False,
    kind: Kind = "person",
    criterion: Criterion = "overall",
    method: Annotated[
        Literal["dawid-skene", "majority", "bradley-terry"],
        typer.Option(help="how one label is made of several verdicts"),
    ] = "dawid-skene",
) -> None:
    """Write soft labels for `pavlov reward`, or the judgements themselves."""
    settings = _label_config(config, overrides)
    from serving.label_commands import export

    if judgements:
        _refuse_unread(context, "with --judgements", "kind", "criterion", "method")
    export(
        settings,
        project,
        out,
        _console(),
        judgements=judgements,
        kind=kind,
        criterion=criterion,
        method=method,
    )


@label.command("report", epilog=f"{_EXAMPLE} report {_OF} --json")
def label_report(
    config: Config,
    project: ProjectName,
    overrides: Overrides = None,
    kind: Kind = "person",
    criterion: Criterion = "overall",
    as_json: AsJson = False,
) -> None:
    """How good the labels are, who gave them, and which model is preferred."""
    settings = _label_config(config, overrides)
    from serving.label_commands import as_lines, show_report

    found = show_report(settings, project, kind, criterion)
    if as_json:
        _print_json(found)
    else:
        print("\n".join(as_lines(found)))


def _label_config(config: Path, overrides: list[str] | None) -> LabelConfig:
    from rlhf.config import LabelConfig, load_config

    return load_config(LabelConfig, config, overrides or [])


def _refuse_unread(context: typer.Context, when: str, *names: str) -> None:
    """Refuse options (by their parameters' names) that were given and change nothing `when`."""
    from rlhf.errors import ConfigError

    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if option.name in names and source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"{option.opts[0]} changes nothing {when}: leave it out")


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

    # Threads that wait for each other sleep: spinning, they stall where anything else computes too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
        if error.errno is None:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        print(f"pavlov: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as ended:
        # Typer makes this of an interrupt.
        if ended.code == 130:
            print("pavlov: interrupted", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
