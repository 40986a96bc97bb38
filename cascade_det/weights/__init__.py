"""Files and addresses of weights: read without running anything, renamed, checked, loaded."""
