"""How conversations are written: templates as data and as Jinja, and the facts that a checkpoint keeps of its own."""
