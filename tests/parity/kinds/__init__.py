"""One module for each kind of recorded case."""
