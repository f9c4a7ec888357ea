"""The frozen encoder: reading and checking its files, sharding it with ZeRO-3, quantising it, and fast kernels."""
