"""The public buffers: storage and a policy put together."""
