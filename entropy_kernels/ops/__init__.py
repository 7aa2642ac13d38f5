"""Numbers for a block of vocabulary rows; this room knows nothing of autograd, models or sequences."""
