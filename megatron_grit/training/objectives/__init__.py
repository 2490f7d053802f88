"""One file for each kind of row, with the same class in each."""
