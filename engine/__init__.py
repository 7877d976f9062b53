"""From token ids to token ids: requests, scheduling, steps, models, sampling."""
