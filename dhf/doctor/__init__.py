"""The doctor: checks of a machine, of ranks and of a problem, one file per theme; each gives facts and findings."""
