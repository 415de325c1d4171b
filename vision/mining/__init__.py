"""Hard example mining over unreduced losses, for any detector: which regions or map elements a step trains on."""

from vision.mining.baselines import AllRegions, RandomPredictions, RandomSample, focal_loss
from vision.mining.candidates import Miner, MiningInputError
from vision.mining.loss_rank_mining import LossRankMiner, loss_rank_mining
from vision.mining.ohem import OHEM
from vision.mining.stratified_ohem import Strata, StratifiedOHEM, assign_strata, moving_strata, staged_strata

__all__ = [
    "AllRegions",
    "LossRankMiner",
    "Miner",
    "MiningInputError",
    "OHEM",
    "RandomPredictions",
    "RandomSample",
    "Strata",
    "StratifiedOHEM",
    "assign_strata",
    "focal_loss",
    "loss_rank_mining",
    "moving_strata",
    "staged_strata",
]
