"""What an optimizer keeps of a parameter, and where of it this process has what."""
