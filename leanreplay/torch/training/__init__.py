"""`fit` and `evaluate`: short loops for people who have none."""
