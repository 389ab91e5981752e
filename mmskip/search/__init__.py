"""`python -m mmskip.search`: the old name of the command line of searches."""
