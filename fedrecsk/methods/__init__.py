"""Floor 3: one file per paper. Functions of arrays and frozen states, no classes of methods."""
