"""Which record comes when: a pure function of seed, step and slot."""
