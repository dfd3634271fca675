"""The Triton backend. ``backend`` and ``launches`` import Triton only where something asks for it."""
