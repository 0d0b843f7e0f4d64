"""Robot logs in, training windows out: contracts, bags, alignment, LeRobot datasets. NumPy only."""
