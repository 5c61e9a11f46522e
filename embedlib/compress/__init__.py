"""Make an encoder small: choose its layers, its vocabulary, and a tokenizer that never emits `<unk>`."""
