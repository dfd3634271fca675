"""Which backends there are. Apart from the registry, so that to check a name nothing need be loaded."""

#: Name of each backend and of the module that holds it.
MODULES = {"cuda": "cuda", "triton": "triton_", "cpu": "cpu", "torch": "torch_"}

#: The order in which backend="auto" tries them, by device type; elsewhere it is torch.
PREFERENCE = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}
