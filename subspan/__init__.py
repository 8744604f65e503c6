"""Subspan trains every parameter of a large language model in a fraction of the memory."""

from subspan.optim.combine import Apollo, Fira, Frugal
from subspan.optim.feedback import Feedback
from subspan.optim.groups import describe_groups, param_groups, quantize_weights
from subspan.optim.optimizer import ProjectedOptimizer
from subspan.optim.presets import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, GaLoreLion, GaLoreSGD, QGaLoreAdamW
from subspan.optim.projectors import SVD, Random, RandomizedSVD, SubspaceIteration
from subspan.optim.refresh import Refresh
from subspan.optim.rules import Adafactor, Adam, ColumnNorm, Lion, Muon, SGDMomentum, SignSGD

__version__ = "0.1.0"

__all__ = [
    "SVD",
    "Adafactor",
    "Adam",
    "Apollo",
    "ColumnNorm",
    "Feedback",
    "Fira",
    "Frugal",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GaLoreLion",
    "GaLoreSGD",
    "Lion",
    "Muon",
    "ProjectedOptimizer",
    "QGaLoreAdamW",
    "Random",
    "RandomizedSVD",
    "Refresh",
    "SGDMomentum",
    "SignSGD",
    "SubspaceIteration",
    "describe_groups",
    "param_groups",
    "quantize_weights",
]
