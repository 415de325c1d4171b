"""Operations shared by the language and the vision wing: attention over slots, losses, low-bit products, training."""
