"""The benchmark MTEB through its own package: our models to it, instructions as data, tasks on local data."""
