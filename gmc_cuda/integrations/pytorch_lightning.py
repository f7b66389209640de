"""GMC inside Lightning, of the package ``pytorch_lightning``."""

from pytorch_lightning.strategies import DDPStrategy

from gmc_cuda.integrations._lightning import TrainersStrategy


class GMCStrategy(TrainersStrategy, DDPStrategy):
    """As :class:`gmc_cuda.integrations.lightning.GMCStrategy`, for pytorch_lightning.Trainer."""
