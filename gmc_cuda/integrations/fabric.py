"""GMC inside Lightning Fabric, of the package ``lightning``."""

from lightning.fabric.strategies import DDPStrategy

from gmc_cuda.integrations._lightning import FabricsStrategy


class GMCFabricStrategy(FabricsStrategy, DDPStrategy):
    """DDPStrategy of Fabric that leaves the gradients to the optimizer.

    ::

        fabric = lightning.Fabric(strategy=GMCFabricStrategy(), devices=2)
        fabric.launch()
        optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1)
        model, optimizer = fabric.setup(model, optimizer)

    The arguments are those of DDPStrategy. All workers must call ``fabric.save()``, which averages
    the memory of the optimizers in its state. ``fabric.no_backward_sync()`` is also ``no_sync()``
    of optimizers with overlap=True.

    Raises:
        ValueError: the optimizer is not gmc_cuda's; or clipping with overlap=True.
        TypeError: the GradScaler is of a class that is neither torch's nor gmc_cuda's.
    """
