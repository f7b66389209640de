"""How a build ends that cannot go on."""


class BuildError(SystemExit):
    """Ends the build with one readable message instead of a traceback."""

    def __init__(self, message):
        super().__init__(f"\ngmc_cuda: {message}\n")
