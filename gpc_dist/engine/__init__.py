"""How it runs on many devices: ranks, the frozen encoder, the trained group, checkpoints."""
