"""A peer for the reward model: TRL's `RewardTrainer` on the same pairs, for a given time.

What came out: `benchmarks/reward_peer.md`.

    python -m benchmarks.reward_peer_trl --model embedded --train train.parquet \\
        --validation validation.parquet --budget-s 360 --out result.json

TRL is no dependency of this project. In an environment of its own, from the project's root:

    pip install --no-deps -r requirements/cpu.txt && pip install --no-deps --no-build-isolation -e .
    pip install --no-deps trl==1.16.0 datasets==5.2.0 multiprocess==0.70.19 xxhash==4.1.0

`--model` is a model folder, a hub id or ``embedded``; files are what `pavlov reward` reads, and
`--limit` takes pairs from them as its `data.limit` does. `--criterion` keeps one criterion's pairs.

TRL's defaults hold (whole model, float32 weights, AdamW at 1e-4, batch 8, at most 3 epochs, no
dropout, bf16 autocast where it is native), but for these:

- Gradient checkpointing is off: it saves memory that a small model does not need, for more time.
- TRL drops a pair with a row of more than `max_length` tokens. Here the prompt is cut on the left
  and the reply on the right, as for Pavlov, so that both learn from the same pairs. ``--overlong
  drop`` leaves the training pairs to TRL; validation pairs are cut either way.
- The learning rate falls linearly to zero, as TRL's does, but over the budget, by the clock (or
  over the epochs, if they end sooner), after 3 steps of warm-up. Training stops when one more step
  would overrun the budget; the first step is made in any case.

The budget holds loading from disk, tokenisation and training, neither a download nor scoring. A
tenth of the training pairs (at most 200, no first user turn shared with the rest) is held out to
fit one temperature after training.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL reports every trainer it makes

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl import RewardConfig, RewardTrainer

from models.head_fitting import fit_temperature
from models.precision import resolve_dtype
from models.preferences import folds_by_first_user_turn, read_pairs
from models.sources import resolve_model
from rlhf.calibration import pair_figures
from rlhf.records import PreferencePair

WARM_UP_STEPS = 3
HELD_OUT_FOLDS = 10
MAX_HELD_OUT_PAIRS = 200
MIN_PROMPT_TOKENS = 32
SCORING_ROWS = 16


class Budget(TrainerCallback):
    """The clock: ends training in time, and says how far along it is."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._started = time.perf_counter()
        self._training_since = 0.0
        self._max_steps = math.inf

    @property
    def spent_s(self) -> float:
        """Seconds since the budget began."""
        return time.perf_counter() - self._started

    def learning_rate_share(self, step: int) -> float:
        """What part of the peak learning rate the step that follows `step` steps uses."""
        done = max(self.spent_s / self._seconds, step / self._max_steps)
        return min((step + 1) / WARM_UP_STEPS, 1.0) * max(0.0, 1.0 - done)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training begins; loading and tokenisation are already spent."""
        self._max_steps = state.max_steps
        self._training_since = self.spent_s

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop when a step of average length would overrun."""
        step_s = (self.spent_s - self._training_since) / state.global_step
        control.should_training_stop |= self.spent_s + step_s > self._seconds

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any
    ) -> None:
        """A line for people, every tenth step."""
        if state.global_step % 10 == 1 and "loss" in logs:
            print(f"{self.spent_s:.0f} s: step {state.global_step}, loss {logs['loss']:.3f}")


def read(paths: Sequence[Path], limit: int | None, criterion: str | None) -> list[PreferencePair]:
    """Usable pairs of the files, of one criterion if it is named."""
    pairs, reports = read_pairs(paths, limit)
    for report in reports:
        print(report.sentence())
    if criterion is not None:
        pairs = [pair for pair in pairs if pair.criterion == criterion]
    if not pairs:
        raise SystemExit(f"no pair has the criterion {criterion!r}")
    return pairs


def hold_out(
    pairs: Sequence[PreferencePair], seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(the rest, held-out pairs), without a first user turn that is in both."""
    folds = folds_by_first_user_turn(pairs, HELD_OUT_FOLDS, seed)
    held_out = [pair for pair, fold in zip(pairs, folds, strict=True) if fold == 0]
    return (
        [pair for pair, fold in zip(pairs, folds, strict=True) if fold > 0],
        held_out[:MAX_HELD_OUT_PAIRS],
    )


def conversation(pair: PreferencePair, reply: str) -> list[dict[str, str]]:
    """The turns up to and with a reply, as chat templates take them."""
    turns = [{"role": turn.role, "content": turn.content} for turn in pair.prompt]
    return [*turns, {"role": "assistant", "content": reply}]


def token_ids(tokenizer: Any, pair: PreferencePair, reply: str, max_length: int) -> list[int]:
    """The row as TRL tokenises it; over `max_length` the prompt is cut left and the reply right."""
    turns = conversation(pair, reply)
    row: list[int] = tokenizer.apply_chat_template(turns)["input_ids"]
    if len(row) <= max_length:
        return row
    prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True)["input_ids"]
    if row[: len(prompt)] != prompt:
        raise SystemExit("this chat template does not put a reply behind its prompt")
    reply_length = len(row) - len(prompt)
    kept_prompt = max(min(MIN_PROMPT_TOKENS, max_length // 2), max_length - reply_length)
    return row[max(0, len(prompt) - kept_prompt) :][:max_length]


def training_rows(
    pairs: Sequence[PreferencePair], tokenizer: Any, max_length: int, overlong: str
) -> Dataset:
    """What `RewardTrainer` takes: tokenised and cut rows, or messages for it to tokenise and drop.

    It knows neither soft labels nor weights: a pair counts once, by the side that its label is on,
    and not at all without a side or a weight.
    """
    rows: list[dict[str, Any]] = []
    for pair in pairs:
        if pair.label == 0.5 or pair.weight == 0:
            continue
        replies = {"chosen": pair.chosen, "rejected": pair.rejected}
        if pair.label < 0.5:
            replies = {"chosen": pair.rejected, "rejected": pair.chosen}
        if overlong == "drop":
            turns = {name: conversation(pair, reply) for name, reply in replies.items()}
            rows.append({"prompt": turns["chosen"][:-1]} | {n: t[-1:] for n, t in turns.items()})
        else:
            rows.append(
                {
                    f"{name}_ids": token_ids(tokenizer, pair, reply, max_length)
                    for name, reply in replies.items()
                }
            )
    return Dataset.from_list(rows)


def train(
    folder: Path, tokenizer: Any, pairs: Sequence[PreferencePair], options: argparse.Namespace
) -> tuple[Any, dict[str, Any]]:
    """Train within the budget; returns the model and what was done."""
    budget = Budget(options.budget_s)
    bf16 = resolve_dtype("auto") == "bfloat16"
    with tempfile.TemporaryDirectory() as output:
        config = RewardConfig(
            output_dir=output,
            model_init_kwargs={"dtype": options.weights},
            learning_rate=options.learning_rate,
            per_device_train_batch_size=options.batch_size,
            max_length=options.max_length,
            gradient_checkpointing=False,
            bf16=bf16,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=options.seed,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = RewardTrainer(
            model=str(folder),
            args=config,
            train_dataset=training_rows(pairs, tokenizer, options.max_length, options.overlong),
            processing_class=tokenizer,
            callbacks=[budget],
        )
        if not (kept := len(trainer.train_dataset)):
            raise SystemExit("no training pair is left; see --overlong and --max-length")
        trainer.remove_callback(PrinterCallback)
        trainer.create_optimizer()
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            trainer.optimizer, budget.learning_rate_share
        )
        prepared_s = budget.spent_s
        trainer.train()
    seconds = budget.spent_s
    steps = trainer.state.global_step
    whole_epochs, further_steps = divmod(steps, math.ceil(kept / options.batch_size))
    seen = whole_epochs * kept + further_steps * options.batch_size
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return trainer.model, {
        "train_pairs": kept,
        "train_pairs_left_out": len(pairs) - kept,
        "pairs_seen": seen,
        "epochs": seen / kept,
        "steps": steps,
        "seconds": seconds,
        "preparation_s": prepared_s,
        "pairs_per_s": seen / (seconds - prepared_s),
        "tokens_per_s": logs[-1]["num_tokens"] / (seconds - prepared_s),
        "bf16_autocast": bf16,
        "loss": [log["loss"] for log in logs],
        "learning_rate": [log["learning_rate"] for log in logs],
    }


def margins(model: Any, tokenizer: Any, pairs: Sequence[PreferencePair], max_length: int) -> Tensor:
    """Reward of `chosen` minus that of `rejected`, shape (N,).

    The trunk runs as in training. The head runs in float32 on the token that
    `AutoModelForSequenceClassification` picks: rewards in bf16, as autocast gives them, would
    differ by steps of 0.4 % and make ties.
    """
    rows = [
        token_ids(tokenizer, pair, reply, max_length)
        for pair in pairs
        for reply in (pair.chosen, pair.rejected)
    ]
    device = next(model.parameters()).device
    trunk = getattr(model, model.base_model_prefix)
    head_H = model.score.weight.detach().float().squeeze(0)
    rewards_R = torch.empty(len(rows))
    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row]))
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(rows), SCORING_ROWS):
            indices = by_length[start : start + SCORING_ROWS]
            batch = tokenizer.pad(
                {"input_ids": [rows[index] for index in indices]},
                padding_side="right",
                return_tensors="pt",
            ).to(device)
            with torch.autocast(
                device.type, torch.bfloat16, enabled=resolve_dtype("auto") == "bfloat16"
            ):
                hidden_BLH = trunk(**batch, use_cache=False).last_hidden_state
            columns_L = torch.arange(hidden_BLH.shape[1], device=device)
            last_B = ((batch["input_ids"] != tokenizer.pad_token_id) * columns_L).argmax(dim=1)
            pooled_BH = hidden_BLH[torch.arange(len(indices), device=device), last_B]
            rewards_R[indices] = (pooled_BH.float() @ head_H).cpu()
    return rewards_R[0::2] - rewards_R[1::2]


def figures(
    margins_N: Tensor, temperature: float, pairs: Sequence[PreferencePair]
) -> dict[str, Any]:
    """Accuracy with its interval and ECE, by the same function as for Pavlov's ensembles."""
    labels_N = torch.tensor([pair.label for pair in pairs])
    weights_N = torch.tensor([pair.weight for pair in pairs])
    found = pair_figures(margins_N.unsqueeze(0), temperature, labels_N, weights_N)
    return {name: value for name, value in found.items() if name != "member_accuracy"}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path, nargs="+", required=True)
    parser.add_argument("--validation", type=Path, nargs="+", required=True)
    parser.add_argument("--criterion")
    parser.add_argument("--limit", type=int, help="of training pairs")
    parser.add_argument("--validation-limit", type=int)
    parser.add_argument("--budget-s", type=float, required=True)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step")
    parser.add_argument("--max-length", type=int, default=256, help="tokens a row")
    parser.add_argument("--weights", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--overlong", choices=["cut", "drop"], default="cut")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Train, score, print the figures and write them as JSON."""
    options = arguments()
    training, held_out = hold_out(
        read(options.train, options.limit, options.criterion), options.seed
    )
    validation = read(options.validation, options.validation_limit, options.criterion)

    folder = resolve_model(options.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model, trained = train(folder, tokenizer, training, options)

    started = time.perf_counter()
    held_out_N = margins(model, tokenizer, held_out, options.max_length)
    temperature = fit_temperature(
        held_out_N,
        torch.tensor([pair.label for pair in held_out]),
        torch.tensor([pair.weight for pair in held_out]),
    )
    margins_N = margins(model, tokenizer, validation, options.max_length)
    raw, scaled = (figures(margins_N, t, validation) for t in (1.0, temperature))
    sources = {}
    for source in sorted({pair.source for pair in validation}):
        of_source = [i for i, pair in enumerate(validation) if pair.source == source]
        sources[source] = figures(
            margins_N[of_source], temperature, [validation[i] for i in of_source]
        )
    result = {
        **raw,
        "ece_after_temperature": scaled["ece"],
        "temperature": temperature,
        "held_out_pairs": len(held_out),
        "zero_margins": int((margins_N == 0).sum()),
        "mean_absolute_margin": float(margins_N.abs().mean()),
        "budget_s": options.budget_s,
        **trained,
        "scoring_s": time.perf_counter() - started,
        "sources_after_temperature": sources,
        "options": vars(options),
        "threads": torch.get_num_threads(),
        "versions": {
            name: metadata.version(name)
            for name in ("trl", "transformers", "accelerate", "datasets", "torch")
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2, default=str) + "\n")
    interval = f"{raw['accuracy_low']:.3f} to {raw['accuracy_high']:.3f}"
    print(
        f"accuracy {raw['accuracy']:.3f} ({interval}), ECE {raw['ece']:.3f}, after temperature "
        f"{scaled['ece']:.3f}; {trained['pairs_seen']} pairs in {trained['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
