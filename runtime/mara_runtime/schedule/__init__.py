"""Schedules: how many candidates and drafted tokens to put into the next pass."""
