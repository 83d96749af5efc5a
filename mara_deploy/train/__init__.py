"""Training of an accept/reject agent: discrete soft actor-critic, docs/guide/train.md."""
