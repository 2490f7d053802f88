"""The options of each kind of training row, one file a kind with the same members in each."""
