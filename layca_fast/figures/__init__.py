"""Drawing, and tables on the terminal."""
