"""Pictures and videos of requests: from a URL, a path or base64 text to pixels, within limits."""
