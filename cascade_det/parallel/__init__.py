"""Several processes of one run: starting them, exchanging data, handling signals."""
