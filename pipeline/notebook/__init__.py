"""Training in a notebook: `scldm.train`, which is found by the entry point `scldm.train`."""
