"""Hugging Face model and agents → traced graph → lowering → parity gate → bundle."""
