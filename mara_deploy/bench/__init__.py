"""What `mara-bench` runs: contestants in processes of their own, and synthetic acceptance."""
