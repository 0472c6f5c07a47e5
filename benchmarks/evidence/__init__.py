"""The evidence for P2D: which data and which weights to train, against everything a user would pick instead."""
