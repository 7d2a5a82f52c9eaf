"""Supervised fine-tuning: what every Ray Train worker runs.

All workers read the same batches; each takes its share of a batch's micro-batches, and gradients
are summed, so that the number of workers does not change what is learnt. Before training, every so
many steps and at the end rank 0 has an engine answer held-out prompts with the weights as they are,
and an ensemble score the answers (`rlhf/stopping.py` says what follows).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.policy import TrainedPolicy
from actors.rollout import GroupRequest
from cluster.files import RunFolder, as_json, folder_beside, keep_steps_before, write_atomically
from cluster.spawn import call, until_alive
from cluster.weights import WeightManifest
from cluster.weights.probe import Probe
from models.conversations import Example, learnt_mask, rows_of
from models.packing import Row, collate, micro_batches, share_of
from rlhf.config import SFTConfig
from rlhf.errors import ActorLostError, PavlovError, RunError
from rlhf.losses import BatchSize, reduce_tokens
from rlhf.records import GroupScores, Prompt, RolloutGroup
from rlhf.seeding import derive_seed
from rlhf.stopping import Evaluation, verdict

_SHUFFLED = 4096
"""Examples among which a batch's are drawn; the file is shuffled already."""


@dataclass(frozen=True, slots=True)
class SFTJob:
    """One run: `prompts` are answered, `prompted` are the same with the baseline's prompting; the
    handles are those of the engine and the ensemble. `folder` must be seen by every node. `start`
    is what is known of the policy before training, where another run has measured it. Without
    `checkpoints` the run cannot go on after a crash, and leaves no optimiser's state."""

    config: SFTConfig
    model: str
    folder: str
    shared_memory: str
    held_out: Sequence[Example]
    prompts: Sequence[Prompt]
    prompted: Sequence[Prompt]
    steps: int
    rollout: Any
    reward: Any
    resume: bool
    start: Evaluation | None = None
    checkpoints: bool = True


def read_evaluations(folder: Path) -> list[Evaluation]:
    """What a run has measured so far."""
    path = folder / "evaluations.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [_evaluation(json.loads(line)) for line in lines]


def train_sft(config: dict[str, Any]) -> None:
    """The loop of a Ray Train worker; `config` holds the `SFTJob` as ``job``."""
    import ray.train

    context = ray.train.get_context()
    worker = SFTWorker(config["job"], context.get_world_rank(), context.get_world_size())
    worker.run(ray.train.get_dataset_shard("train"))


class SFTWorker(TrainedPolicy):
    """One rank; the ranks have met already."""

    def __init__(self, job: SFTJob, rank: int, world_size: int) -> None:
        config = job.config
        super().__init__(
            job.model,
            config.policy.dtype,
            config.learner,
            config.rollout.dtype,
            config.cluster.weight_transport,
            job.shared_memory,
            rank,
            world_size,
            config.policy.lora,
            config.seed,
        )
        self._job = job
        self._run = RunFolder(Path(job.folder))
        self._judge = Judge(job)
        self._evaluations: list[Evaluation] = []
        self._events: Any = None

    def run(self, train: Any) -> None:
        """Train on a Ray Data iterator of examples until the verdict is to stop."""
        self.start(None)
        try:
            first = self._resume() if self._job.resume else 0
            if self._stopped():
                return
            self._watch(first)
            step = first
            for step, batch in enumerate(self._batches(train)):
                if step >= first and self._due(step) and self._evaluate(step):
                    return
                if step >= first:
                    self._train(batch, step)
            self._evaluate(step + 1)
        finally:
            if self._events is not None:
                self._events.close()
            self.shutdown()

    def _watch(self, first_step: int) -> None:
        """Begin, or go on with, the TensorBoard events."""
        if self._rank == 0:
            from tensorboardX import SummaryWriter

            folder = self._run.path / "tensorboard"
            self._events = SummaryWriter(str(folder), purge_step=first_step)

    def _plot(self, step: int, values: Mapping[str, float]) -> None:
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def _stopped(self) -> bool:
        """Whether an earlier attempt had come to its end."""
        seen, settings = self._evaluations, self._job.config.stopping
        return bool(seen) and (verdict(seen, settings).stop or seen[-1].step == self._job.steps)

    def _due(self, step: int) -> bool:
        seen = self._evaluations[-1].step if self._evaluations else -1
        return step % self._job.config.stopping.every == 0 and step > seen

    def _batches(self, train: Any) -> Iterator[list[Example]]:
        settings = self._job.config.sft
        for epoch in range(settings.epochs):
            for batch in train.iter_batches(
                batch_size=settings.batch_conversations,
                batch_format="pyarrow",
                local_shuffle_buffer_size=_SHUFFLED,
                local_shuffle_seed=derive_seed(self._job.config.seed, "sft", epoch) % 2**31,
            ):
                yield [
                    Example(tuple(ids), tuple(learnt))
                    for ids, learnt in zip(
                        batch["token_ids"].to_pylist(), batch["learnt"].to_pylist(), strict=True
                    )
                ]

    def _train(self, batch: Sequence[Example], step: int) -> None:
        """One optimiser step on this rank's share of the batch."""
        assert self._engine is not None
        started = time.monotonic()
        totals = [0.0]
        losses = [self._loss(batch, *share, totals) for share in self._shares(batch)]
        norm = self._engine.step(losses, step)
        [loss] = self._summed(totals)
        if self._rank == 0:
            row = {
                "step": step,
                "loss/train": loss,
                "losses/gradient_norm": norm,
                "tokens/step": sum(len(example.token_ids) for example in batch),
                "tokens/learnt": sum(example.count for example in batch),
                "time/step_s": time.monotonic() - started,
            }
            with (self._run.path / "metrics.jsonl").open("a") as file:
                file.write(as_json(row) + "\n")
            self._plot(step, row)

    def _shares(self, batch: Sequence[Example]) -> list[tuple[list[Row], float]]:
        packing = self._job.config.sft.packing
        budget = self._settings.micro_batch_tokens
        rows = rows_of(batch, packing=packing, budget_tokens=budget)
        chunks = micro_batches(rows, budget, aligned=not packing)
        return share_of(chunks, self._rank, self._world_size)

    def _loss(
        self, batch: Sequence[Example], rows: list[Row], live: float, totals: list[float]
    ) -> Callable[[], Tensor]:
        """A micro-batch's part of the mean loss over learnt tokens, computed when called."""
        size = BatchSize(len(batch), sum(example.count for example in batch), 1)

        def compute() -> Tensor:
            assert self._engine is not None
            aligned = not self._job.config.sft.packing
            packed = collate(rows, self._tokenizer.pad_id, self._engine.device, aligned=aligned)
            logprobs_NT = self._engine.run(packed, 1.0)[0]
            loss = -reduce_tokens(logprobs_NT, live * learnt_mask(batch, packed), "token", size)
            totals[0] += float(loss.detach())
            return loss

        return compute

    def _held_out_loss(self) -> float:
        """Mean over the held-out examples' learnt tokens. A collective."""
        held_out = self._job.held_out
        totals = [0.0]
        with torch.no_grad():
            for share in self._shares(held_out):
                self._loss(held_out, *share, totals)()
        return self._summed(totals)[0]

    def _evaluate(self, step: int) -> bool:
        """Measure, keep what is best, leave a checkpoint; returns whether to stop. A collective.

        The policy is written aside, the checkpoint holds the evaluations, and only then is the
        policy given its name and the evaluation shown: who is killed in between loses the last
        evaluation and nothing else.
        """
        version = len(self._evaluations)
        found = self._job.start if step == 0 else None
        if found is None:
            found = self._measure(step, version)
        flags = [0.0, 0.0]
        if self._rank == 0:
            said = verdict([*self._evaluations, found], self._job.config.stopping)
            flags = [said.stop, version in (said.best_by_reward, said.best_by_loss)]
            measured = {"loss/held_out": found.loss, "reward/mean": found.reward}
            self._plot(step, measured | {"ensemble/disagreement": found.disagreement})
        self._evaluations.append(found)
        stop, best = self._summed(flags)
        if best:
            self.save_policy(str(self._aside(step)))
        if self._job.checkpoints:
            self._checkpoint(step)
        if self._rank == 0:
            self._show()
        torch.distributed.barrier()
        return bool(stop)

    def _measure(self, step: int, version: int) -> Evaluation:
        """Loss and reward of the weights as they are. A collective: ranks other than the first
        learn only how many evaluations there were, and where."""
        loss = self._held_out_loss()
        manifest, probe = self.export_weights(version), self.probe()
        if self._rank:
            return Evaluation(step, loss, (0.0,), (0.0,))
        assert manifest is not None
        return self._judge.evaluate(step, loss, manifest, probe)

    def _aside(self, step: int) -> Path:
        return self._run.path / ".kept" / f"step-{step:06d}"

    def _show(self) -> None:
        """Give the best policies their names, then let everybody see the evaluations."""
        said = verdict(self._evaluations, self._job.config.stopping)
        places = {"policy": said.best_by_reward, "policy-by-loss": said.best_by_loss}
        for name, place in places.items():
            kept = self._aside(self._evaluations[place].step)
            if kept.is_dir():
                with folder_beside(self._run.path / name) as beside:
                    # Links: both may be the same gigabytes.
                    shutil.copytree(kept, beside, copy_function=os.link, dirs_exist_ok=True)
        shutil.rmtree(self._run.path / ".kept", ignore_errors=True)
        text = "".join(json.dumps(asdict(each)) + "\n" for each in self._evaluations)
        write_atomically(self._run.path / "evaluations.jsonl", text)

    def _checkpoint(self, step: int) -> None:
        target = self._run.path / "checkpoints" / f"step-{step:06d}"
        keep = self._job.config.run.keep_checkpoints
        state = {"evaluations": [asdict(each) for each in self._evaluations]}
        with contextlib.ExitStack() as stack:
            if self._rank == 0:
                stack.enter_context(self._run.new_checkpoint(step, state, keep))
            torch.distributed.barrier()
            self.save_checkpoint(str(target.with_name(f".{target.name}.part")))
            torch.distributed.barrier()

    def _resume(self) -> int:
        """Go on from the newest checkpoint; returns its step."""
        newest = self._run.newest_checkpoint()
        step = newest[1]["step"] if newest else 0
        if newest is not None:
            self.load_checkpoint(str(newest[0]))
            self._evaluations = [_evaluation(row) for row in newest[1]["evaluations"]]
        if self._rank == 0:
            keep_steps_before(self._run.path / "metrics.jsonl", step)
            if self._evaluations:
                self._show()
        torch.distributed.barrier()
        return int(step)

    def _summed(self, values: Sequence[float]) -> list[float]:
        """The sums over ranks."""
        assert self._engine is not None
        tensor = torch.tensor(list(map(float, values)), device=self._engine.device)
        torch.distributed.all_reduce(tensor)
        return [float(value) for value in tensor]


class Judge:
    """Has the engine answer and the ensemble score; on rank 0."""

    def __init__(self, job: SFTJob) -> None:
        self._job = job
        cluster = job.config.cluster
        self._call_s, self._start_s = cluster.call_timeout_s, cluster.start_timeout_s

    def evaluate(
        self, step: int, loss: float, manifest: WeightManifest, probe: Probe
    ) -> Evaluation:
        """Answers to every prompt by these weights, scored; before the first step also those of
        the prompted start policy, which are judged as answers to the prompts as they are."""
        return asyncio.run(self._evaluate(step, loss, manifest, probe))

    async def _evaluate(
        self, step: int, loss: float, manifest: WeightManifest, probe: Probe
    ) -> Evaluation:
        job = self._job
        prompted = job.prompted if step == 0 else ()
        requests = [self._request(prompt) for prompt in (*job.prompts, *prompted)]
        # It is given the weights with every call: one that was started again needs nothing else.
        groups = await self._asked(job.rollout, "answer", "rollout-0", manifest, probe, requests)
        _require(groups, RolloutGroup)
        folder, count = Path(job.folder), len(job.prompts)
        # The same question for both: what a prompt adds to every reward would be compared too.
        asked = [*job.prompts, *(job.prompts if prompted else ())]
        plain = [replace(group, prompt=one) for group, one in zip(groups, asked, strict=True)]
        scores = await self._asked(job.reward, "score", "reward-0", plain)
        _require(scores, GroupScores)
        if prompted:
            found = _judged(step, loss, groups[count:], scores[count:])
            _write_answers(folder / "answers" / "baseline.jsonl", groups[count:], scores[count:])
            write_atomically(folder / "baseline.json", json.dumps(asdict(found)) + "\n")
        path = folder / "answers" / f"step-{step:06d}.jsonl"
        _write_answers(path, groups[:count], scores[:count])
        return _judged(step, loss, groups[:count], scores[:count])

    async def _asked(self, handle: Any, method: str, name: str, *arguments: Any) -> list[Any]:
        """What an actor answers; one that died is started again by Ray and asked once more."""
        try:
            return list(await call(getattr(handle, method).remote(*arguments), name, self._call_s))
        except ActorLostError:
            await until_alive(handle, name, self._call_s, self._start_s)
        return list(await call(getattr(handle, method).remote(*arguments), name, self._call_s))

    def _request(self, prompt: Prompt) -> GroupRequest:
        config = self._job.config
        seed = derive_seed(config.seed, "answers", prompt.id)
        answers = config.answers
        return GroupRequest(prompt, 0, (seed,), answers.max_tokens, answers.temperature)


def _judged(
    step: int, loss: float, groups: Sequence[RolloutGroup], scores: Sequence[GroupScores]
) -> Evaluation:
    return Evaluation(
        step,
        loss,
        tuple(score.rewards_G[0] for score in scores),
        tuple(score.disagreement_G[0] for score in scores),
        statistics.fmean(score.domain_shift_G[0] for score in scores),
        statistics.fmean(group.completions[0].length for group in groups),
    )


def _require(results: Iterable[Any], kind: type) -> None:
    """Every prompt was checked before training: one that fails now is no bad row."""
    for result in results:
        if not isinstance(result, kind):
            raise result if isinstance(result, PavlovError) else RunError(str(result))


def _write_answers(
    path: Path, groups: Sequence[RolloutGroup], scores: Sequence[GroupScores]
) -> None:
    path.parent.mkdir(exist_ok=True)
    rows = [
        {
            "id": group.prompt.id,
            "prompt": [asdict(message) for message in group.prompt.messages],
            "answer": group.completions[0].text,
            "finished": group.completions[0].finish_reason == "stop",
            "reward": score.rewards_G[0],
            "disagreement": score.disagreement_G[0],
            "domain_shift": score.domain_shift_G[0],
        }
        for group, score in zip(groups, scores, strict=True)
    ]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def _evaluation(row: dict[str, Any]) -> Evaluation:
    values: Any = {
        name: tuple(value) if isinstance(value, list) else value for name, value in row.items()
    }
    return Evaluation(**values)
