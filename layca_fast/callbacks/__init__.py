"""RotationMonitor inside of trainers: ``callbacks.lightning`` and ``callbacks.huggingface``, each for its package."""
