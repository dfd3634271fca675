"""``python -m layca_fast demo``: a real network on real digits, with SGD and with FusedLayca."""
