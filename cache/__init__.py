"""Where keys and values live: the radix tree over token ids, the page allocator, the KV buffers."""
