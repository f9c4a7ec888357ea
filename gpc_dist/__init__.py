"""GPC-Dist: tune a Global Prompt Cell on a frozen, sharded pretrained encoder."""

__version__ = "0.1.0"
