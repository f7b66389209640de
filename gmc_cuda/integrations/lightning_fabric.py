"""GMC inside Lightning Fabric, of the package ``lightning_fabric``."""

from lightning_fabric.strategies import DDPStrategy

from gmc_cuda.integrations._lightning import FabricsStrategy


class GMCFabricStrategy(FabricsStrategy, DDPStrategy):
    """As :class:`gmc_cuda.integrations.fabric.GMCFabricStrategy`, for lightning_fabric."""
