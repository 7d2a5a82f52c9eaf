"""What packing siblings into one row saves: forward and backward pass, packed against one row each.

    python -m benchmarks.packing [--groups 8] [--siblings 6] [--tokens 40]

Both are timed in turns in one process, so that the ratio stands on a noisy machine.
"""

from __future__ import annotations

import argparse
import time

import torch

from models.chat import ChatTokenizer
from models.loading import load_causal_model
from models.logprobs import TokenLogprobs
from models.packing import MAX_ROW_TOKENS, collate, micro_batches, pack
from models.sources import resolve_model
from rlhf.records import Message

BUDGET_TOKENS = 1024


def run(module: TokenLogprobs, prompts: list, replies: list, row_tokens: int, pad_id: int) -> float:
    """Seconds for one forward and backward pass over all replies."""
    started = time.perf_counter()
    for rows in micro_batches(pack(prompts, replies, row_tokens), BUDGET_TOKENS):
        batch = collate(rows, pad_id)
        logprobs_NT, _ = module(batch, 1.0)
        (logprobs_NT * batch.reply_mask_NT).sum().backward()
    module.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    """Print seconds and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--siblings", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=40)
    arguments = parser.parse_args()
    folder = resolve_model("embedded")
    tokenizer = ChatTokenizer(folder)
    module = TokenLogprobs(load_causal_model(folder, "auto")).train()
    generator = torch.Generator().manual_seed(0)
    prompts, replies = [], []
    for group in range(arguments.groups):
        prompt = tokenizer.prompt_ids([Message("user", f"Tell me about the number {group}.")])
        for _ in range(arguments.siblings):
            prompts.append(prompt)
            ids = torch.randint(100, 40000, (arguments.tokens,), generator=generator)
            replies.append(tuple(ids.tolist()))
    times: dict[int, list[float]] = {1: [], MAX_ROW_TOKENS: []}
    for _ in range(3):
        for row_tokens, seconds in times.items():
            seconds.append(run(module, prompts, replies, row_tokens, tokenizer.pad_id))
    single, packed = (min(seconds) for seconds in times.values())
    print(f"one row each {single:.2f} s, packed {packed:.2f} s, ratio {single / packed:.2f}")


if __name__ == "__main__":
    main()
