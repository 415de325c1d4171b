"""Vision models over HTTP: their process and its worker, uploads, URLs, and one route a kind."""
