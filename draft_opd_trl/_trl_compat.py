"""Every private name of TRL that the package uses, in one place, so that a new TRL release is one file to mend."""

from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.models.utils import _ForwardRedirection
from trl.trainer.base_config import _BaseConfig
from trl.trainer.base_trainer import _BaseTrainer
from trl.trainer.utils import RepeatSampler, create_model_from_path, disable_dropout_in_model, identity


__all__ = [
    "ChunkedDivergenceFunction",
    "RepeatSampler",
    "_BaseConfig",
    "_BaseTrainer",
    "_ForwardRedirection",
    "create_model_from_path",
    "disable_dropout_in_model",
    "identity",
]
