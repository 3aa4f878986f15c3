"""Which samples stay, planned from positions and groups alone."""
