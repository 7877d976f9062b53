"""Keep keys and values: the radix tree over token ids, the page allocator, the KV buffers."""
