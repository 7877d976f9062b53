"""Who generates: a server over HTTP, an engine in this process, or another company's API."""
