"""Hugging Face model and agent → traced graph → lowering → parity gate → bundle."""
