"""Strict, typed configuration: TOML files with dotted overrides.

| file | holds |
|---|---|
| `section.py` | what all settings share |
| `algorithms.py` | `rl`: the loop, algorithms, KL, entropy, shaping |
| `ensemble.py` | pairs, the reward model's members |
| `actors.py` | models, optimiser, engine, placement |
| `runs.py` | a configuration for each command: `RLConfig`, `RewardConfig`, `DemoConfig` |
| `sft.py`, `tune.py` | supervised fine-tuning and its search: `SFTConfig`, `TuneConfig` |
| `reading.py` | files, overrides, and what is said of a wrong one |

One root class a command. A sentence stands under every field; limits stand in the types; validators
say which two settings clash and why.
"""

from rlhf.config.actors import (
    ClusterSection,
    LearnerSection,
    LoRASection,
    PolicySection,
    ReferenceSection,
    RolePlacement,
    RolloutSection,
)
from rlhf.config.algorithms import (
    AlgorithmSettings,
    CEMSection,
    ClippedSection,
    CriticSection,
    EntropySection,
    GRPOSection,
    GSPOSection,
    KLSection,
    OffPolicySection,
    PPOSection,
    ReinforcePPSection,
    RewardFunction,
    RLOOSection,
    RLSection,
    ShapingSection,
    SteeredSection,
)
from rlhf.config.ensemble import (
    EnsembleSection,
    FullMembers,
    LoRAMembers,
    MemberLearnerSection,
    Members,
    OwnLayers,
    PairFile,
    PairsSection,
    ProbeMembers,
    TopMembers,
    TrainedMembers,
)
from rlhf.config.label import AttentionSection, LabelConfig, LabelSection, SimulatedSection
from rlhf.config.reading import (
    data_path,
    expanded,
    known_keys,
    load_config,
    parse_config,
    read_again,
    runs_path,
)
from rlhf.config.runs import (
    AssessorSection,
    DemoConfig,
    DomainShiftSection,
    LoopConfig,
    PromptsSection,
    RewardConfig,
    RewardSection,
    RLConfig,
    RunSection,
)
from rlhf.config.section import DType, Fraction, Gpus, Section
from rlhf.config.serve import AssistantSection, ReplicasSection, ServeConfig, ServeSection
from rlhf.config.sft import (
    AnswersSection,
    BaselineSection,
    ConversationsSection,
    JudgeSection,
    SFTConfig,
    SFTSection,
    StoppingSection,
)
from rlhf.config.tune import TuneConfig, TuneSection

__all__ = [
    "AlgorithmSettings",
    "AnswersSection",
    "AssessorSection",
    "AssistantSection",
    "AttentionSection",
    "BaselineSection",
    "CEMSection",
    "ClippedSection",
    "ClusterSection",
    "ConversationsSection",
    "CriticSection",
    "DType",
    "DemoConfig",
    "DomainShiftSection",
    "EnsembleSection",
    "EntropySection",
    "Fraction",
    "FullMembers",
    "GRPOSection",
    "GSPOSection",
    "Gpus",
    "JudgeSection",
    "KLSection",
    "LabelConfig",
    "LabelSection",
    "LearnerSection",
    "LoRAMembers",
    "LoRASection",
    "LoopConfig",
    "MemberLearnerSection",
    "Members",
    "OffPolicySection",
    "OwnLayers",
    "PPOSection",
    "PairFile",
    "PairsSection",
    "PolicySection",
    "ProbeMembers",
    "PromptsSection",
    "RLConfig",
    "RLOOSection",
    "RLSection",
    "ReferenceSection",
    "ReinforcePPSection",
    "ReplicasSection",
    "RewardConfig",
    "RewardFunction",
    "RewardSection",
    "RolePlacement",
    "RolloutSection",
    "RunSection",
    "SFTConfig",
    "SFTSection",
    "Section",
    "ServeConfig",
    "ServeSection",
    "ShapingSection",
    "SimulatedSection",
    "SteeredSection",
    "StoppingSection",
    "TopMembers",
    "TrainedMembers",
    "TuneConfig",
    "TuneSection",
    "data_path",
    "expanded",
    "known_keys",
    "load_config",
    "parse_config",
    "read_again",
    "runs_path",
]
