"""What ``python -m layca_fast`` runs: one file, or folder, a command."""
