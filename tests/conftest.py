"""What tests of several folders share: tiny random models and the real data.

Everything is made offline, in a second. Imports stand inside the fixtures: tests of `rlhf` load
neither transformers nor tokenizers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.postgres import binaries, postgresql

# As `pavlov` does, before torch is imported: on a machine that does something else meanwhile,
# threads that spin make a test take ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Nor does it make an example wrong.
settings.register_profile("pavlov", deadline=None)
settings.load_profile("pavlov")

ROOT = Path(__file__).parents[1]

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = [
    "The quick brown fox jumps over the lazy dog. In 1984 a small town by the river counted 3,512",
    "people; most of them baked bread, mended nets or taught at the school on the hill.",
    "How do I keep pasta from sticking together? Stir it once and use enough water.",
    "Why does my rice turn out mushy, and how can I fix it? Use less water and do not stir.",
    "user assistant system What is a good name for a cat? The answer is yes, no or maybe.",
]
VOCABULARY = 448


def build_tiny_model(folder: Path, *, chat_template: str | None = CHATML, seed: int = 0) -> Path:
    """A two-layer random Llama (hidden 128, heads of 32: vLLM's CPU kernels refuse 16) in `folder`.

    Weights are float32 safetensors, with the head tied to the embedding as in the embedded model.
    The tokenizer is a byte-level BPE, trained on `TEXT`; a turn ends with ``<|im_end|>``. Without
    `chat_template` it is like a raw base model.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            min_frequency=1,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert bpe.get_vocab_size() == VOCABULARY
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=1024,
    )
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        # Wide enough for a distribution with structure: a wrong position is far from a right one.
        initializer_range=0.06,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_tiny_reward_model(folder: Path, *models: Path) -> Path:
    """A reward-model folder: on the whole of each tiny model four random heads, two on either
    family, for the criterion `overall`."""
    import torch

    from models.chat import ChatTokenizer
    from models.heads import Heads
    from models.reward_model import BankCard, FamilyCard, GroupCard, RewardCard, RewardModel
    from models.sources import weights_fingerprint

    generator = torch.Generator().manual_seed(0)
    banks = tuple(
        BankCard(
            model=str(model),
            model_fingerprint=weights_fingerprint(model),
            tokenizer_fingerprint=ChatTokenizer(model).fingerprint,
            families=(FamilyCard(layers=2, pooling="last"), FamilyCard(layers=2, pooling="mean")),
            groups=tuple(
                GroupCard(kind="probe", count=2, family=family, l2={"overall": 0.1})
                for family in range(2)
            ),
        )
        for model in models
    )
    card = RewardCard(
        version="tiny",
        banks=banks,
        dtype="float32",
        max_tokens=128,
        criteria=("overall",),
        combination={"overall": 1.0},
        temperature={"reward": 1.0, "overall": 1.0},
        signal_mean=(0.0, 0.0),
        signal_deviation=(1.0, 1.0),
        threshold=None,
        false_alarm_rate=0.05,
        false_alarm_interval=(0.0, 0.0),
        seed=0,
        data={},
        metrics={},
    )
    heads = [
        Heads(
            weights_KCH=torch.randn(4, 1, 128, generator=generator) / 11,
            family_K=torch.tensor([0, 0, 1, 1]),
            kin_K=torch.tensor([0, 0, 1, 1]),
            feature_mean_FH=torch.zeros(2, 128),
            feature_deviation_FH=torch.ones(2, 128),
            whitening_FHH=torch.eye(128).repeat(2, 1, 1),
            member_mean_KC=torch.zeros(4, 1),
            member_deviation_KC=torch.ones(4, 1),
            combination_C=torch.ones(1),
            combined_deviation_K=torch.ones(4),
        )
        for _ in models
    ]
    folder.mkdir()
    RewardModel(card, heads).save(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tiny random chat model. Shared: copy it before changing it."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without a chat template, as a raw base model."""
    return build_tiny_model(tmp_path_factory.mktemp("models") / "tiny-base", chat_template=None)


@pytest.fixture(scope="session")
def tiny_reward_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Four random heads on `tiny_model`. Shared: copy it before changing it."""
    return build_tiny_reward_model(tmp_path_factory.mktemp("reward") / "reward", tiny_model)


@pytest.fixture(scope="session")
def hh_data() -> Path:
    """The folder of real data, PAVLOV_DATA, with ``hh/`` in it."""
    folder = Path(os.environ.get("PAVLOV_DATA") or ROOT / "../shared/data").expanduser().resolve()
    if not (folder / "hh").is_dir():
        pytest.skip(f"no HH-RLHF data in {folder}; set PAVLOV_DATA to a folder that has hh/ in it")
    return folder


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server of the tests' own."""
    if binaries() is None:
        pytest.skip("PostgreSQL is not installed")
    with postgresql() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def labels_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty labelling database: SQLite, and PostgreSQL where it is installed."""
    from labelling.database import Database
    from rlhf.config.label import database_url

    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/labels.db"
        return
    url = request.getfixturevalue("postgres_url")
    yield url
    database = Database(database_url(url))
    with database.writing() as db:
        db.exec_driver_sql("DROP SCHEMA public CASCADE")
        db.exec_driver_sql("CREATE SCHEMA public")
    database.close()
