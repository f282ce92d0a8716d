"""Chat templates: rendering, what they do with turns, and conversations that keep their ids."""
