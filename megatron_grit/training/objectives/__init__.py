"""How each kind of row is trained, one file a kind with the same members in each."""
