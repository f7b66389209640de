"""GMC inside Lightning, of the package ``lightning``; others have modules of their names."""

from lightning.pytorch.strategies import DDPStrategy

from gmc_cuda.integrations._lightning import TrainersStrategy


class GMCStrategy(TrainersStrategy, DDPStrategy):
    """DDPStrategy that leaves the gradients to the optimizer, and averages memory before a save.

    ::

        trainer = lightning.Trainer(strategy=GMCStrategy(), devices=2, gradient_clip_val=1.0)

    with a GMC or DGC from ``configure_optimizers``. The arguments are those of DDPStrategy.
    Gradient clipping clips each worker's own gradient. With ``precision="16-mixed"`` the GradScaler
    becomes a :class:`gmc_cuda.GradScaler`.

    Raises:
        ValueError: the optimizer is not gmc_cuda's; or clipping or accumulation with overlap=True.
        TypeError: the GradScaler is of a class that is neither torch's nor gmc_cuda's.
    """
