"""What `mara-bench` runs: contestants in processes of their own, and an instrument with a set profile of decisions."""
