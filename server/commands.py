"""The commands of this package, by the first word of a command line."""

COMMANDS = {
    "serve": "serve a model, which may be named at once: `radixloop serve Qwen/Qwen3-0.6B`; the default",
    "chat": "talk to a server in this terminal: `radixloop chat [URL]`",
    "doctor": "say what this machine can run, a line each",
    "models": "list the architectures that are served",
    "router": "one address for several servers",
    "completion": "print completions for a shell: `radixloop completion bash`",
}
