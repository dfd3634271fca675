"""One step: from param groups to batches, and what must be known of them before and after."""
