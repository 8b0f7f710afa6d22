"""The settings of a training run: a flat, frozen dataclass per stage, with bounds at its fields.

    Logistics --- RunConfig --- SFTConfig                 stage sft: flow matching on images
                      |
    Scores -------- Rollout --- DistillationConfig        stage opd: distillation from teachers
                         |
                   RewardedConfig --- GRPOConfig          stage grpo: reinforcement learning from rewards
                         \\----------- NFTConfig           stage nft: the same without likelihoods

The values of named runs are in opd/presets.py. Nothing is read here: a file or an adapter is only a name.
"""

from opd.config.distillation import DistillationConfig
from opd.config.rewarded import GRPOConfig, NFTConfig, RewardedConfig
from opd.config.sft import SFTConfig
from opd.config.shared import Logistics, Rollout, RunConfig, Scores

STAGES = {kind.stage: kind for kind in (DistillationConfig, GRPOConfig, NFTConfig, SFTConfig)}
