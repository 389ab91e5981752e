"""What blocks do, measured while they run."""
