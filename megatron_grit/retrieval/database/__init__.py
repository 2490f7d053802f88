"""What the tasks of a database share: its chunks as they are cut, their vectors, its versions."""
