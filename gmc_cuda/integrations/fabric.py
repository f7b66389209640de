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

    Arguments: those of DDPStrategy. All workers must call ``fabric.save()``, which averages the
    memory of the optimizers that it is given. ``fabric.no_backward_sync()`` is ``no_sync()`` of
    optimizers with overlap=True, too.

    Raises:
        ValueError: another optimizer; clipping with one that has overlap=True.
        TypeError: a GradScaler of a class of its own.
    """
